// Package eventlog is the bus's only buffer: an append-only stream of records
// in segment files, a line of JSON each, that is durable before it is
// acknowledged and read by any number of cursors.
//
// One committer goroutine drains whatever batches have arrived, writes them
// with one write and one sync, and only then releases the publishers and the
// readers (group commit: the sync in progress is the batching window). Readers
// hold a position, never a queue; recent records come from memory, older ones
// from the segment files. The byte format is described in docs/EVENTLOG.md.
package eventlog
