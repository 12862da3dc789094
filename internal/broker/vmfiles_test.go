package broker

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/presence"
)

// TestVMFile compares what is written with what encoding/json makes of the contract's
// members.
func TestVMFile(t *testing.T) {
	type bus struct {
		Protocol  string   `json:"protocol"`
		Topics    []string `json:"subscribed_topics"`
		Publish   *int64   `json:"last_publish_ts"`
		Heartbeat *int64   `json:"last_heartbeat_ts"`
		Subscribe *int64   `json:"last_subscribe_ts"`
	}
	type file struct {
		VM           string   `json:"vm"`
		Timestamp    int64    `json:"timestamp"`
		Capabilities []string `json:"capabilities"`
		Bus          *bus     `json:"bus"`
	}
	at := func(s int64) time.Time { return time.Unix(s, 999) }
	ten, twenty := int64(10), int64(20)
	for _, tt := range []struct {
		last presence.Last
		want file
	}{
		{presence.Last{Handshake: at(5)}, file{"web1", 5, []string{}, nil}},
		{presence.Last{Handshake: at(5), Capabilities: []string{"exec", `a"\b`}}, file{"web1", 5, []string{"exec", `a"\b`}, nil}},
		{
			presence.Last{Handshake: at(5), Capabilities: []string{"exec", "bus-v1"}},
			file{"web1", 5, []string{"exec", "bus-v1"}, &bus{Protocol: "bus-v1", Topics: []string{}}},
		},
		{
			presence.Last{Handshake: at(5), Capabilities: []string{"bus-v1"}, Topics: []string{"a.*", "vm:web1"}, Publish: at(10), Heartbeat: at(20), Subscribe: at(10)},
			file{"web1", 5, []string{"bus-v1"}, &bus{"bus-v1", []string{"a.*", "vm:web1"}, &ten, &twenty, &ten}},
		},
	} {
		want, err := json.Marshal(tt.want)
		if err != nil {
			t.Fatal(err)
		}
		got := appendVMFile(nil, "web1", &tt.last)
		if string(got) != string(want) {
			t.Errorf("wrote %s, want %s", got, want)
		}
		if file := string(appendPadding(got)); len(file) != vmFileUnit || strings.TrimRight(file[:len(file)-1], " ")+file[len(file)-1:] != string(want)+"\n" {
			t.Errorf("the file holds %q", file)
		}
	}
}
