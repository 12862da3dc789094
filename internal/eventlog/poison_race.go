//go:build race

package eventlog

// poison tells whether memory is written over as soon as nobody holds it: whoever looks
// at it after that is seen, by what he reads or by the race detector.
const poison = true
