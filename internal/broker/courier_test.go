package broker

import (
	"net"
	"runtime"
	"strconv"
	"testing"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
)

// However many guests read nothing, or wait for a disk, the others hear what comes.
func TestCouriersGiveWay(t *testing.T) {
	for _, c := range []struct {
		name  string
		block bool // the disk
	}{{"guests that read nothing", false}, {"a disk that blocks", true}} {
		t.Run(c.name, func(t *testing.T) {
			disk := &stuckFS{FS: eventlog.OS}
			o := testOptions(t, t.TempDir())
			o.FS = disk
			o.UnsentBytes = 64 << 10
			o.ReachableWithin, o.SessionTimeout = hang, 4*hang // nobody is helped by the end of those who wait
			b := start(t, o)
			n := 2*runtime.GOMAXPROCS(0) + 1
			var slow []string
			subscribe := func(from string) {
				for i := range n {
					slow = append(slow, "slow"+strconv.Itoa(i))
					g := connect(t, b.addr, slow[i])
					if err := g.conn.(*net.TCPConn).SetReadBuffer(4 << 10); err != nil {
						t.Fatal(err)
					}
					g.send(`{"type":"subscribe","topic":"t","from":` + from + `}`)
					g.expect(`{"ack":"subscribe","status":"ok"}`)
				}
			}
			if c.block {
				bulk(t, b, "t", 300) // more than is in memory
				t.Cleanup(disk.stop("read"))
				subscribe("1")
			} else {
				subscribe(`"now"`)
				bulk(t, b, "t", 30) // more than a connection takes, and not more than memory
			}
			eventually(t, "they are behind", func() bool {
				for _, vm := range b.Status(slow).VMs {
					if vm.Lag == 0 {
						return false
					}
				}
				return true
			})
			live := connect(t, b.addr, "live")
			live.send(`{"type":"subscribe","topic":"vm:live"}`)
			live.expect(`{"ack":"subscribe","status":"ok"}`)
			if _, err := b.Publish(t.Context(), bus.PublishRequest{Topic: "vm:live", Payload: []byte(`"here"`)}); err != nil {
				t.Fatal(err)
			}
			live.expect(`{"type":"publish","payload":"here"}`)
		})
	}
}
