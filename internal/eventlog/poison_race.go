//go:build race

package eventlog

// poison tells whether memory that nobody holds any more is written over at once: whoever
// looks at it all the same is seen, by what he reads or by the race detector.
const poison = true
