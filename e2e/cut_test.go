package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestPowerCut has castrad write to a VM's disk, whose writes and flushes QEMU logs, and
// starts castrad on what a power cut may leave of it: 20 times, or CASTRA_CUTS times with
// each kind of disk. What was acknowledged before the cut is there, once and unchanged.
func TestPowerCut(t *testing.T) {
	cuts, err := strconv.Atoi(os.Getenv("CASTRA_CUTS"))
	if err != nil {
		powerCuts(t, "mkfs.ext4", diskSector, "64KiB", 1, 20)
		return
	}
	// What XFS takes for written as soon as its first sector is: a block.
	for mkfs, torn := range map[string]int64{"mkfs.ext4": diskSector, "mkfs.xfs": 4096} {
		for _, segment := range []string{"64KiB", "64MiB"} {
			t.Run(mkfs+" "+segment, func(t *testing.T) { powerCuts(t, mkfs, torn, segment, 2, cuts) })
		}
	}
}

// A cutLab is a castrad in a VM, and what it was given.
type cutLab struct {
	*lab
	records []*cutRecord
}

// cutRecord is a record, the only one on its topic.
type cutRecord struct {
	vm, topic, id, payload string

	seq    uint64 // in the ack; 0: there is none
	logged int64  // how long the log was when the ack had come
}

// powerCuts boots a VM with a new disk, and another one with what a power cut left to the
// one before. Each is given records, and then that many power cuts are tried.
func powerCuts(t *testing.T, mkfs string, torn int64, segment string, boots, cuts int) {
	c := &cutLab{lab: newLab(t)}
	c.loadedConfig(fmt.Sprintf("sync = \"always\"\nsegment_size = %q", segment))
	kernel := c.vmDisk(t)
	conf, err := os.ReadFile(c.path("castrad.toml"))
	if err != nil {
		t.Fatal(err)
	}
	// Here and in the VM everything is on that disk.
	c.write("castrad.toml", "%s", strings.ReplaceAll(string(conf), c.dir, c.path("mnt")))
	c.write("vm.toml", "%s", strings.NewReplacer(c.dir, "/mnt", fmt.Sprintf("127.0.0.1:%d", c.port), "0.0.0.0:7070").Replace(string(conf)))
	for from, to := range map[string]string{bin(t, "castrad"): "castrad", c.path("vm.toml"): "castrad.toml"} {
		mustRun(t, "debugfs", "-w", "-R", "write "+from+" /root/"+to, c.path("disk"))
	}
	data, image := c.path("data.img"), c.path("cut.img")
	mustRun(t, "truncate", "--size=320M", data) // less is too small for XFS
	mustRun(t, mkfs, "-q", "-L", "cut", data)
	mustRun(t, "mkdir", c.path("mnt"))
	t.Cleanup(func() { _ = command(sudo("umount", "--lazy", c.path("mnt"))...).Run() })

	for boot := range boots {
		mustRun(t, "cp", "--sparse=always", data, c.path("before.img"))
		c.write("writes", "")
		old := len(c.records)
		c.publishInVM(kernel, boot)
		d := openWriteLog(t, c.path("writes"), c.path("before.img"), torn)
		// Right behind an ack, anywhere, and write by write: all that one record, one round
		// of the journal or one segment takes is among them.
		points := make([]int, cuts)
		from := 1 + rand.IntN(len(d.writes)-cuts)
		for i := range points {
			switch i % 3 {
			case 0:
				points[i] = d.within(c.records[old+rand.IntN(len(c.records)-old)].logged)
			case 1:
				points[i] = 1 + rand.IntN(len(d.writes))
			case 2:
				points[i] = from + i/3
			}
		}
		slices.Sort(points)
		var next int64 // where the next VM goes on
		for i, n := range points {
			d.cut(image, n)
			if i == cuts/2 {
				mustRun(t, "cp", "--sparse=always", image, data)
				next = d.writes[n-1].logged
			}
			c.Setenv("CASTRA_BOOT", []string{"", "unknown"}[i%2]) // another boot, or who knows
			c.startAfter(image, d.writes[n-1].logged)
			if t.Failed() {
				t.Fatalf("boot %d, after %d of %d writes", boot, n, len(d.writes))
			}
		}
		for _, r := range c.records { // what came after that is forgotten, and all before it stays
			if r.logged > next {
				r.seq = 0
			}
			r.logged = 0
		}
		t.Logf("boot %d: %d records, %d writes and flushes, cut %d times", boot, len(c.records), len(d.writes), cuts)
	}
}

// publishInVM boots a VM whose castrad has the disk, and publishes: first one record at a
// time, with nothing beside it, and then hundreds at once.
func (c *cutLab) publishInVM(kernel string, boot int) {
	c.Helper()
	// By virtio, for QEMU's NVMe takes a FUA write and does not flush it.
	vm, qemu := c.bootVMBy(nil, fmt.Sprintf("vm%d", boot), kernel, "10.0.2.2:1",
		"-blockdev", "driver=file,node-name=data,filename=data.img,cache.no-flush=on",
		"-blockdev", "driver=file,node-name=log,filename=writes,cache.no-flush=on",
		"-blockdev", "driver=blklogwrites,node-name=cut,file=data,log=log", "-device", "virtio-blk-pci,drive=cut",
		"-netdev", fmt.Sprintf("user,id=in,net=10.0.3.0/24,hostfwd=tcp:127.0.0.1:%d-:7070", c.port),
		"-device", "virtio-net-pci,netdev=in,romfile=")
	vm.booted()
	vm.run("mount LABEL=cut /mnt && DBUS_SYSTEM_BUS_ADDRESS=unix:path=/none /root/castrad --config /root/castrad.toml &")
	c.takesGuests()
	for _, r := range c.records {
		if r.seq == 0 && r.id != "" { // nobody knows whether castrad has it
			c.publish(1, r)
		}
	}
	c.publish(1, c.newRecords(fmt.Sprintf("lone%d", boot), 300)...)
	var many sync.WaitGroup
	for n := range 8 {
		records := c.newRecords(fmt.Sprintf("many%d.%d", boot, n), 100)
		many.Go(func() { c.publish(64, records...) })
	}
	many.Wait()
	c.stop("vm", qemu)
}

// logged tells how long the log of writes is.
func (c *cutLab) logged() int64 {
	info, err := os.Stat(c.path("writes"))
	if err != nil {
		c.Error(err)
		return 0
	}
	return info.Size()
}

// newRecords makes records of all sizes, one in four without an id.
func (c *cutLab) newRecords(vm string, count int) []*cutRecord {
	for n := range count {
		r := &cutRecord{vm: vm, topic: fmt.Sprintf("bench.%s.%d", vm, n), id: strconv.Itoa(n), payload: "null"}
		if n%4 == 3 {
			r.id = ""
		}
		size := rand.IntN(1024)
		switch rand.IntN(8) {
		case 0:
			size = rand.IntN(60<<10 - 1)
		case 1:
			size = 32<<10 - rand.IntN(512) // what just goes to the journal, or does not
		}
		if n%8 > 0 {
			text := make([]byte, size)
			for i := range text {
				text[i] = 'a' + byte(rand.IntN(26))
			}
			r.payload = strconv.Quote(string(text))
		}
		c.records = append(c.records, r)
	}
	return c.records[len(c.records)-count:]
}

// publish has records of one VM acknowledged, with window of them outstanding.
func (c *cutLab) publish(window int, records ...*cutRecord) {
	p, err := dialWire(c.port, records[0].vm)
	if err != nil {
		c.Error(err)
		return
	}
	defer p.Close()
	_ = p.(*wirePeer).SetDeadline(time.Now().Add(5 * time.Minute)) // a VM may hang
	sent := 0
	for done, r := range records {
		for ; sent < min(len(records), done+window); sent++ {
			frame := fmt.Appendf(nil, `{"type":"publish","topic":%q,"payload":%s}`, records[sent].topic, records[sent].payload)
			if id := records[sent].id; id != "" {
				frame = fmt.Appendf(frame[:len(frame)-1], `,"id":%q}`, id)
			}
			if err := p.send(frame); err != nil {
				c.Error(err)
				return
			}
		}
		var a struct {
			Ack, Status, ID string
			Seq             uint64
		}
		b, err := p.receive()
		if err == nil {
			err = json.Unmarshal(b, &a)
		}
		if err != nil || a.Ack != "publish" || a.Status != "ok" || a.ID != r.id || r.seq > 0 && a.Seq != r.seq {
			c.Errorf("%s, number %d by an earlier ack, is answered with %s, %v", r.topic, r.seq, b, err)
			return
		}
		r.seq, r.logged = a.Seq, c.logged()
	}
}

// takesGuests waits until castrad does, in the VM or here.
func (c *cutLab) takesGuests() {
	c.Helper()
	c.within(slowHang, "castrad takes a guest", func() error {
		p, err := dialWire(c.port, "first")
		if err == nil {
			err = p.Close()
		}
		return err
	})
}

// startAfter starts castrad on the disk that a power cut left when the log was so long.
func (c *cutLab) startAfter(image string, logged int64) {
	c.Helper()
	c.root("mount", "-o", "loop", image, c.path("mnt"))
	c.root("chown", "-R", strconv.Itoa(os.Getuid()), c.path("mnt"))
	castrad := c.startCastrad("castrad")
	c.takesGuests()
	// Again: of each VM the newest that it was told of, and the first that it was not.
	known, again := make(map[string]cutRecord), make(map[string]*cutRecord)
	for _, r := range c.records {
		now := *r
		if now.logged > logged {
			now.seq = 0
		}
		known[now.topic] = now
		if told := fmt.Sprint(now.vm, now.seq > 0); now.id != "" && (now.seq > 0 || again[told] == nil) {
			again[told] = &now
		}
	}
	again["new"] = &cutRecord{vm: "late", topic: "bench.late", payload: "{}"}
	for _, r := range again {
		c.publish(1, r)
		known[r.topic] = *r
	}
	c.stop("castrad", castrad)
	c.compare(known)
	c.root("umount", c.path("mnt"))
}

// compare compares what is on the disk with what is known, by topic.
func (c *cutLab) compare(known map[string]cutRecord) {
	c.Helper()
	c.castractl("bus", "verify", "--log-dir", c.path("mnt/log"))
	said, err := os.ReadFile(c.path("castrad.log"))
	for _, loss := range []string{"damaged", "may be missing", "who was reachable when castrad ended is not known"} {
		if err != nil || bytes.Contains(said, []byte(loss)) {
			c.Errorf("castrad says that something is lost: %s, %v", said, err)
		}
	}
	streams := make(map[string][]uint64) // a VM's numbers
	for i, r := range c.stream("host") {
		if r.Seq != uint64(i)+1 {
			c.Fatalf("record %d of the host's stream has the number %d", i+1, r.Seq)
		}
		if r.VM == "host" {
			continue // presence
		}
		streams[r.VM] = append(streams[r.VM], r.Seq)
		want := known[r.Topic]
		if want.vm != r.VM || want.id != r.ID || want.payload != string(r.Payload) || want.seq > 0 && want.seq != r.Seq {
			c.Errorf("record %d, %s's %s with id %q and %d bytes, was published with id %q and %d bytes, acknowledged as %d, or is there twice",
				r.Seq, r.VM, r.Topic, r.ID, len(r.Payload), want.id, len(want.payload), want.seq)
		}
		delete(known, r.Topic)
	}
	for _, r := range known {
		if r.seq > 0 {
			c.Errorf("%s was acknowledged as %d and is not there", r.topic, r.seq)
		}
	}
	for vm, want := range streams {
		var got []uint64
		for _, r := range c.stream("vm/" + vm) {
			got = append(got, r.Seq)
		}
		if !slices.Equal(got, want) {
			c.Errorf("the stream of %s has %d, and the host's %d of it", vm, got, want)
		}
	}
}

type stored struct {
	Seq           uint64
	VM, Topic, ID string
	Payload       json.RawMessage
}

// stream reads what a stream has on the disk.
func (c *cutLab) stream(dir string) (all []stored) {
	c.Helper()
	files, err := filepath.Glob(c.path("mnt/log/bus/" + dir + "/*.jsonl"))
	if err != nil {
		c.Fatal(err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			c.Fatal(err)
		}
		for line := range bytes.Lines(b) {
			var r stored
			if err := json.Unmarshal(line, &r); err != nil {
				c.Fatalf("%s has %q: %v", file, line, err)
			}
			all = append(all, r)
		}
	}
	return all
}
