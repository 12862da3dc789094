package cli

import (
	"io"
	"strings"
	"testing"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusclient"
)

// answering is a bus that stores a request under a number and answers with the given
// streams, one after the other; asked is what it was asked.
func answering(seq uint64, streams ...string) (c *fakeClient, published *bus.PublishRequest, tails *[]bus.TailRequest) {
	c, published, tails = withStatus(), new(bus.PublishRequest), new([]bus.TailRequest)
	c.publish = func(req bus.PublishRequest) (uint64, error) { *published = req; return seq, nil }
	c.tail = func(req bus.TailRequest) (io.ReadCloser, error) {
		*tails = append(*tails, req)
		if len(*tails) > len(streams) {
			return nil, dbusclient.ErrNotRunning
		}
		return io.NopCloser(strings.NewReader(streams[len(*tails)-1])), nil
	}
	return c, published, tails
}

const anAnswer = `{"seq":1100,"time":"2026-03-04T05:06:07Z","vm":"web1","topic":"vm:web1/reply.x","payload":{"ok":true}}` + "\n"

func TestRequest(t *testing.T) {
	c, published, tails := answering(1043, anAnswer+strings.ReplaceAll(anAnswer, "true", "false"))
	run(t, c, []string{"bus", "request", "--vm", "web1", "job/next"}).want(t, ExitDone, `{"ok":true}`+"\n", "")
	if published.Topic != "vm:web1/job/next" || string(published.Payload) != "null" || !strings.HasPrefix(published.Reply, "vm:web1/reply.") {
		t.Errorf("published %+v", published)
	}
	want := bus.TailRequest{From: 1044, Topics: []string{published.Reply}, Follow: true}
	if len(*tails) != 1 || (*tails)[0].From != want.From || (*tails)[0].Topics[0] != want.Topics[0] || !(*tails)[0].Follow {
		t.Errorf("tailed %+v, want %+v", *tails, want)
	}
}

// Records that are gone are no answer, and a castrad that restarts meanwhile is waited
// for, from where it was left.
func TestRequestGapAndRestart(t *testing.T) {
	c, _, tails := answering(1043, `{"type":"gap","from":1044,"to":1050}`+"\n", anAnswer)
	c.status = func([]string) (bus.Status, error) {
		st := testStatus()
		st.Broker.HeadSeq = 1100
		return st, nil
	}
	run(t, c, []string{"bus", "request", "--vm", "web1", "t"}).want(t, ExitDone, `{"ok":true}`+"\n", "gap: records 1044 to 1050 are gone")
	if len(*tails) != 2 || (*tails)[1].From != 1051 {
		t.Errorf("tailed %+v", *tails)
	}
}

// In a guest the answer comes to its own topic; a request that waits for the host has
// no number yet, and its answer one above the newest that is known.
func TestRequestInGuest(t *testing.T) {
	c, published, tails := answering(0, anAnswer)
	c.status = func([]string) (bus.Status, error) {
		st := testStatus()
		st.Broker.Kind, st.VMs = kindGuest, st.VMs[3:]
		return st, nil
	}
	run(t, c, []string{"bus", "request", "jobs.next"}).want(t, ExitDone, `{"ok":true}`+"\n", "")
	if published.Topic != "jobs.next" || !strings.HasPrefix(published.Reply, "vm:web1/reply.") || (*tails)[0].From != 1043 {
		t.Errorf("published %+v, tailed %+v", published, *tails)
	}
}

// The number that the host gave counts, and not what a guest had heard of the log
// before the host was installed anew.
func TestRequestInGuestOfAnotherHost(t *testing.T) {
	c, _, tails := answering(11, anAnswer)
	c.status = func([]string) (bus.Status, error) {
		st := testStatus()
		st.Broker.Kind, st.VMs = kindGuest, st.VMs[3:]
		return st, nil
	}
	run(t, c, []string{"bus", "request", "jobs.next"}).want(t, ExitDone, `{"ok":true}`+"\n", "")
	if (*tails)[0].From != 12 {
		t.Errorf("tailed %+v", *tails)
	}
}
