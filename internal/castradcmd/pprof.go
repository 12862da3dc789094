package castradcmd

import (
	"context"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"runtime"
	"syscall"
	"time"
)

// profileTimeout bounds a profile that is asked for with ?seconds=.
const profileTimeout = 5 * time.Minute

// sampleRate is how many bytes are allocated between two samples of the heap
// profile where somebody may ask for one: the runtime's own default.
const sampleRate = 512 << 10

// noProfiles keeps the runtime from sampling allocations: unless a pprof socket is
// passed in, nobody can look at them.
func noProfiles() { runtime.MemProfileRate = 0 }

// profiles serves what net/http/pprof does, to root and to castrad's own user.
func profiles(srv *http.Server) http.Handler {
	srv.WriteTimeout = profileTimeout
	srv.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		return context.WithValue(ctx, entitledKey{}, entitled(c))
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if ok, _ := r.Context().Value(entitledKey{}).(bool); !ok {
			http.Error(w, "profiles are for root and for the user that castrad runs as", http.StatusForbidden)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// entitledKey is the context's key for whether the connection's peer may have profiles.
type entitledKey struct{}

// entitled tells whether the process at the other end was root's or of castrad's own
// user when it connected (SO_PEERCRED, unix(7)).
func entitled(c net.Conn) bool {
	if r, ok := c.(*roomyConn); ok {
		c = r.Conn
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return false
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return false
	}
	var cred *syscall.Ucred
	cerr := raw.Control(func(fd uintptr) {
		cred, err = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	return cerr == nil && err == nil && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid())
}
