package wire

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
)

// publish256 is a guest's publish whose payload is an object of 256 bytes.
func publish256() []byte {
	payload := `{"t":1764016260123456789,"n":4711,"host":"web1","level":"info","ok":true,"tags":["a","b","c"],"cpu":{"user":12.5,"system":3.25},"text":"`
	payload += strings.Repeat("x", 256-len(payload)-2) + `"}`
	return []byte(`{"type":"publish","topic":"metrics.cpu","id":"web1-00004711","payload":` + payload + `}`)
}

func benchmarkDecode(b *testing.B, frame []byte) {
	var d Decoder
	var m Message
	buf := make([]byte, len(frame))
	b.SetBytes(int64(len(frame)))
	b.ReportAllocs()
	for b.Loop() {
		copy(buf, frame) // Decode compacts in place
		if err := d.Decode(buf, &m); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	spaced := strings.NewReplacer(`,"`, `, "`, `":`, `": `).Replace(string(publish256()))
	multi := `{"type":"publish","payload":"` + strings.Repeat("größe ", 40) + `"}`
	long := `{"type":"publish","payload":"` + strings.Repeat("x", MaxPayload-2) + `"}`
	var keys strings.Builder
	for i := range 6500 {
		fmt.Fprintf(&keys, `,"%04x":0`, i^0x1555)
	}
	b.Run("publish-256", func(b *testing.B) { benchmarkDecode(b, publish256()) })
	b.Run("publish-256-spaced", func(b *testing.B) { benchmarkDecode(b, []byte(spaced)) })
	b.Run("publish-multibyte", func(b *testing.B) { benchmarkDecode(b, []byte(multi)) })
	b.Run("publish-60KiB", func(b *testing.B) { benchmarkDecode(b, []byte(long)) })
	b.Run("heartbeat", func(b *testing.B) { benchmarkDecode(b, []byte(`{"type":"heartbeat"}`)) })
	b.Run("guest-ack", func(b *testing.B) {
		benchmarkDecode(b, []byte(`{"type":"ack","ack":"publish","subscription":"s","seq":123456}`))
	})
	b.Run("hostile-keys", func(b *testing.B) { benchmarkDecode(b, []byte(`{"type":"x"`+keys.String()+`}`)) })
}

func BenchmarkAppendAck(b *testing.B) {
	ack := Ack{Kind: "publish", Topic: []byte("metrics.cpu"), ID: []byte("web1-00004711"), Seq: 123456}
	var dst []byte
	b.ReportAllocs()
	for b.Loop() {
		dst = AppendAckFrame(dst[:0], &ack)
	}
}

func BenchmarkNextFrame(b *testing.B) {
	buf := bytes.Repeat(AppendFrame(nil, publish256()), 64)
	b.ReportAllocs()
	for b.Loop() {
		for rest := buf; len(rest) > 0; {
			var err error
			if _, rest, err = NextFrame(rest); err != nil {
				b.Fatal(err)
			}
		}
	}
}

func BenchmarkMatch(b *testing.B) {
	p, err := ParsePattern("metrics.*.>")
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if !p.Match("metrics.web1.cpu.user") {
			b.Fatal("no match")
		}
	}
}
