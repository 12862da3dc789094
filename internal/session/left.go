package session

import "syscall"

// tcpEstablished is what TCP_INFO begins with while both sides may send
// (TCP_ESTABLISHED, linux/tcp_states.h).
const tcpEstablished = 1

// Left tells whether the guest has closed its side, be it that this session has not
// read so far yet. It waits for nothing.
func (s *Session) Left() bool {
	left := s.ended.Load() != nil
	err := s.raw.Control(func(fd uintptr) {
		// Its first byte is the state: struct tcp_info, linux/tcp.h. A Unix socket
		// has none, and tells only once everything before the end is read.
		if state, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_INFO); err == nil {
			left = left || state&0xff != tcpEstablished
			return
		}
		n, _, err := syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		left = left || n == 0 && err == nil
	})
	return left || err != nil
}
