package guest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// published is what Publish returned.
type published struct {
	seq uint64
	err error
}

// publish calls Publish in a goroutine of its own.
func (f *fixture) publish(req bus.PublishRequest) <-chan published {
	done := make(chan published, 1)
	go func() {
		seq, err := f.Publish(context.Background(), req)
		done <- published{seq, err}
	}()
	synctest.Wait()
	return done
}

func TestPublishReturnsTheHostsSeq(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := runAgent(t, nil)
		p := f.net.accept(t)
		synctest.Wait()
		done := f.publish(bus.PublishRequest{Topic: "vm:self/x", Reply: "vm:self", ID: "mine", Payload: []byte(`{"a":1}`)})
		p.want(`{"type":"publish","topic":"vm:web1/x","id":"mine","reply":"vm:web1","payload":{"a":1}}`)
		p.ack("mine", 42)
		if r := <-done; r.seq != 42 || r.err != nil {
			t.Errorf("got %+v", r)
		}
		done = f.publish(bus.PublishRequest{Topic: "t"})
		id := p.wantPublish("null", 0)
		if !strings.HasPrefix(id, f.idBase) || len(f.idBase) != 33 {
			t.Errorf("id %q does not begin with 128 bits of this process and a dash", id)
		}
		p.send(fmt.Sprintf(`{"type":"ack","ack":"publish","status":"error","code":"bad-topic","reason":"no","id":%q}`, id))
		if r := <-done; refusalOf(r.err).Code != bus.CodeBadTopic {
			t.Errorf("got %+v", r)
		}
	})
}

// A machine that is put back to a snapshot of its memory publishes other messages under the
// numbers that it has used: under ids of theirs the host would not store them.
func TestIDsAreNewAfterASnapshot(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := runAgent(t, nil)
		p := f.net.accept(t)
		seen := make(map[string]bool)
		snapshot := f.ids.Load()
		for range 3 {
			f.ids.Store(snapshot)
			for range 2 {
				done := f.publish(bus.PublishRequest{Topic: "t"})
				id := p.wantPublish("null", 1)
				if <-done; seen[id] {
					t.Errorf("id %s comes a second time", id)
				}
				seen[id] = true
			}
			time.Sleep(time.Nanosecond)
		}
	})
}

func TestPublishRefusesAtOnceWhatTheHostWould(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := runAgent(t, nil)
		f.net.refuse(errRefusedConnection)
		for topic, want := range map[string]bus.Code{
			"vm:web2": bus.CodeForbidden, "vm:web2/x": bus.CodeForbidden, "castra.presence": bus.CodeForbidden,
			"a b": bus.CodeBadTopic, "vm:": bus.CodeBadTopic, "vm:selfish": bus.CodeForbidden,
		} {
			if _, err := f.Publish(t.Context(), bus.PublishRequest{Topic: topic}); refusalOf(err).Code != want {
				t.Errorf("%s: %v", topic, err)
			}
		}
		if _, err := f.Publish(t.Context(), bus.PublishRequest{Topic: "t", Payload: make([]byte, wire.MaxPayload+1)}); refusalOf(err).Code != bus.CodeTooLarge {
			t.Errorf("too large: %v", err)
		}
		if _, err := f.WaitAck(t.Context(), 1); refusalOf(err).Code != bus.CodeNotHere {
			t.Errorf("WaitAck: %v", err)
		}
	})
}

// What is published while the host is away goes out in order when it is back, under
// the same ids for as long as it is not acknowledged.
func TestPublishesSurviveTheLossOfSessions(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := runAgent(t, nil)
		f.net.refuse(errRefusedConnection)
		for i := range 3 {
			if seq, err := f.Publish(t.Context(), bus.PublishRequest{Topic: "t", Payload: fmt.Append(nil, i)}); seq != 0 || err != nil {
				t.Fatal(seq, err)
			}
		}
		f.net.refuse(nil)
		p := f.net.accept(t)
		ids := make([]string, 5)
		ids[0] = p.wantPublish("0", 10)
		ids[1], ids[2] = p.wantPublish("1", 0), p.wantPublish("2", 0)
		done := f.publish(bus.PublishRequest{Topic: "t", Payload: []byte("3")})
		ids[3] = p.wantPublish("3", 0)
		_ = p.conn.Close()
		if r := <-done; r.seq != 0 || r.err != nil {
			t.Errorf("when the session broke, the publisher was told %+v", r)
		}
		if seq, err := f.Publish(t.Context(), bus.PublishRequest{Topic: "t", Payload: []byte("4")}); seq != 0 || err != nil {
			t.Fatal(seq, err)
		}
		p = f.net.accept(t)
		for i := 1; i < 5; i++ {
			id := p.wantPublish(fmt.Sprint(i), uint64(10+i))
			if ids[i] != "" && id != ids[i] {
				t.Errorf("record %d came as %s and then as %s", i, ids[i], id)
			}
			ids[i] = id
		}
		slices.Sort(ids)
		if len(slices.Compact(ids)) != 5 {
			t.Errorf("ids are not unique: %q", ids)
		}
		synctest.Wait()
		if c := f.outbox.counts(); c.records != 0 || c.published != 5 {
			t.Errorf("counts %+v", c)
		}
	})
}

func TestPublisherIsNotKeptWaiting(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := runAgent(t, nil)
		p := f.net.accept(t)
		synctest.Wait()
		begun := time.Now()
		done := f.publish(bus.PublishRequest{Topic: "t", Payload: []byte("1")})
		id := p.wantPublish("1", 0)
		p.send(fmt.Sprintf(`{"type":"ack","ack":"publish","status":"error","code":"storage-full","reason":"full","retry_after_ms":60000,"id":%q}`, id))
		if r := <-done; r.seq != 0 || r.err != nil || time.Since(begun) != ackPatience {
			t.Errorf("after %v: %+v", time.Since(begun), r)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := f.Publish(ctx, bus.PublishRequest{Topic: "t"}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v: whether it is kept was open when the caller left", err)
		}
		if _, err := f.Publish(ctx, bus.PublishRequest{Topic: "t"}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if c := f.outbox.counts(); c.records != 2 {
			t.Errorf("%d records are kept", c.records)
		}
	})
}
