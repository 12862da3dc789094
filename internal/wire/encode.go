package wire

import "strconv"

// The encoders append one whole frame each, its length prefix included: compact
// JSON with "type" first. Their callers see to it that what they pass is valid;
// of any other string they still make valid JSON.

// AppendPublishFrame appends a guest's publish. An empty topic, id or reply is
// left out; payload is one compact JSON value of MaxPayload bytes at most, nil
// being null.
func AppendPublishFrame(dst []byte, topic, id, reply string, payload []byte) []byte {
	dst, mark := BeginFrame(dst)
	dst = append(dst, `{"type":"publish"`...)
	dst = appendText(dst, `,"topic":`, topic)
	dst = appendText(dst, `,"id":`, id)
	dst = appendText(dst, `,"reply":`, reply)
	dst = append(dst, `,"payload":`...)
	if payload == nil {
		dst = append(dst, "null"...)
	}
	dst = append(dst, payload...)
	return endObject(dst, mark)
}

// AppendSubscribeFrame appends a guest's subscribe. from is the member's JSON:
// `"start"`, `42`, `-10`. An empty sub, from or cursor is left out.
func AppendSubscribeFrame(dst []byte, topic, sub, from, cursor string) []byte {
	dst, mark := BeginFrame(dst)
	dst = append(dst, `{"type":"subscribe","topic":`...)
	dst = AppendString(dst, topic)
	dst = appendText(dst, `,"sub":`, sub)
	if from != "" {
		dst = append(dst, `,"from":`...)
		dst = append(dst, from...)
	}
	dst = appendText(dst, `,"cursor":`, cursor)
	return endObject(dst, mark)
}

// AppendUnsubscribeFrame appends a guest's unsubscribe.
func AppendUnsubscribeFrame(dst []byte, subscription string) []byte {
	dst, mark := BeginFrame(dst)
	dst = append(dst, `{"type":"unsubscribe","subscription":`...)
	dst = AppendString(dst, subscription)
	return endObject(dst, mark)
}

// AppendHeartbeatFrame appends a guest's heartbeat.
func AppendHeartbeatFrame(dst []byte) []byte {
	return AppendFrame(dst, []byte(`{"type":"heartbeat"}`))
}

// AppendGuestAckFrame appends a guest's word that it has processed everything
// delivered on the subscription up to seq.
func AppendGuestAckFrame(dst []byte, subscription string, seq uint64) []byte {
	dst, mark := BeginFrame(dst)
	dst = append(dst, `{"type":"ack","ack":"publish","subscription":`...)
	dst = AppendString(dst, subscription)
	dst = appendUint(dst, `,"seq":`, seq)
	return endObject(dst, mark)
}

// Ack is a broker's answer to a guest's message.
type Ack struct {
	Kind         string // the type of what is answered
	Code, Reason string // empty code: it was done
	Topic, ID    []byte // as the guest sent them, to tell its messages apart
	Subscription []byte
	Seq          uint64 // 0: none
	RetryAfterMS int64  // 0: none
	NotDurable   bool   // done, but not yet proof against a power cut: adds "durable":false
	Queued       bool   // kept in a guest's spool, the host has not numbered it yet: adds "queued":true
}

// AppendAck appends the ack's JSON object, without a length prefix. A topic,
// subscription or id longer than its limit is left out: it was refused for
// that, and escaped it might not fit a frame.
func AppendAck(dst []byte, a *Ack) []byte {
	dst = append(dst, `{"type":"ack","ack":`...)
	dst = AppendString(dst, a.Kind)
	if a.Code == "" {
		dst = append(dst, `,"status":"ok"`...)
	} else {
		dst = append(dst, `,"status":"error","code":`...)
		dst = AppendString(dst, a.Code)
		dst = append(dst, `,"reason":`...)
		dst = AppendString(dst, a.Reason)
		if a.RetryAfterMS > 0 {
			dst = appendUint(dst, `,"retry_after_ms":`, uint64(a.RetryAfterMS))
		}
	}
	if len(a.Topic) <= MaxTopic {
		dst = appendText(dst, `,"topic":`, a.Topic)
	}
	if len(a.Subscription) <= MaxTopic {
		dst = appendText(dst, `,"subscription":`, a.Subscription)
	}
	if len(a.ID) <= MaxID {
		dst = appendText(dst, `,"id":`, a.ID)
	}
	if a.Seq != 0 {
		dst = appendUint(dst, `,"seq":`, a.Seq)
	}
	if a.NotDurable {
		dst = append(dst, `,"durable":false`...)
	}
	if a.Queued {
		dst = append(dst, `,"queued":true`...)
	}
	return append(dst, '}')
}

// AppendAckFrame appends the ack as a frame.
func AppendAckFrame(dst []byte, a *Ack) []byte {
	dst, mark := BeginFrame(dst)
	dst = AppendAck(dst, a)
	EndFrame(dst, mark)
	return dst
}

// AppendGapFrame appends a broker's word that the subscription will never get
// the records from from to to.
func AppendGapFrame(dst []byte, subscription string, from, to uint64) []byte {
	dst, mark := BeginFrame(dst)
	dst = append(dst, `{"type":"gap","subscription":`...)
	dst = AppendString(dst, subscription)
	dst = appendUint(dst, `,"from":`, from)
	dst = appendUint(dst, `,"to":`, to)
	return endObject(dst, mark)
}

// AppendErrorFrame appends the last frame of a session that the broker ends.
func AppendErrorFrame(dst []byte, code, reason string) []byte {
	dst, mark := BeginFrame(dst)
	dst = append(dst, `{"type":"error","code":`...)
	dst = AppendString(dst, code)
	dst = append(dst, `,"reason":`...)
	dst = AppendString(dst, reason)
	return endObject(dst, mark)
}

func endObject(dst []byte, mark int) []byte {
	dst = append(dst, '}')
	EndFrame(dst, mark)
	return dst
}

// appendText appends a string member, unless it is empty.
func appendText[T string | []byte](dst []byte, key string, value T) []byte {
	if len(value) == 0 {
		return dst
	}
	dst = append(dst, key...)
	return AppendString(dst, value)
}

func appendUint(dst []byte, key string, n uint64) []byte {
	dst = append(dst, key...)
	return strconv.AppendUint(dst, n, 10)
}
