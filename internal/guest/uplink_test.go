package guest

import (
	"context"
	"errors"
	"net"
	"os"
	"syscall"
	"testing"
)

// Whatever it is that did not answer in time, it is the same news; what failed for
// another reason says so.
func TestPlain(t *testing.T) {
	refused := &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	for _, tt := range []struct {
		err, want error
	}{
		{&net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, errTimedOut},
		{&net.OpError{Op: "dial", Err: context.DeadlineExceeded}, errTimedOut},
		{&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ETIMEDOUT)}, errTimedOut},
		{&net.OpError{Op: "dial", Err: &net.DNSError{Err: "no answer", Name: "host", IsTimeout: true}}, errTimedOut},
		{refused, syscall.ECONNREFUSED},
	} {
		if got := plain(tt.err); !errors.Is(got, tt.want) {
			t.Errorf("%v: %v, want %v", tt.err, got, tt.want)
		}
	}
}
