package session

import (
	"testing"
	"time"
)

// TestRetryAfterIsEnough tells a guest that comes back exactly when it was told to from
// one that is refused again.
func TestRetryAfterIsEnough(t *testing.T) {
	for _, tt := range []struct {
		wait time.Duration
		told int64
	}{
		{1, 1},
		{time.Millisecond, 1},
		{time.Millisecond + 1, 2},
		{time.Second / 3, 334},
	} {
		if told := wholeMS(tt.wait); told != tt.told {
			t.Errorf("a guest that has to wait %v is told %d ms, not %d", tt.wait, told, tt.told)
		}
	}
}
