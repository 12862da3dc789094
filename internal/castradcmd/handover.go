package castradcmd

import (
	"os"
	"time"

	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/sdnotify"
)

// storePatience is how long the service manager may take to answer.
const storePatience = 5 * time.Second

// handOver leaves the sessions to the castrad that is started next. Whether there
// is to be one nobody says: a service manager that only stops this one drops what
// it was given, and the connections with it.
func (d *daemon) handOver() {
	if !sdnotify.Managed() {
		return
	}
	began := time.Now()
	n, err := d.broker.HandOver(func(f *os.File) error {
		return sdnotify.Store(sdnotify.HandOver, f, storePatience)
	})
	if err != nil {
		logging.HandOverFailed.On(d.log).WithError(err).Warn("sessions are not handed over to the next castrad; guests connect anew")
		return
	}
	logging.SessionsHandedOver.On(d.log).WithField("count", n).WithField("took", time.Since(began).String()).Info("sessions handed over to the next castrad")
}

// inherit takes in what a castrad before has left with the service manager, which
// keeps it no longer from here on: should it be what this castrad trips over, the
// next one starts without.
func (d *daemon) inherit(stored *os.File) {
	if err := sdnotify.Unstore(sdnotify.HandOver); err != nil {
		logging.HandOverFailed.On(d.log).WithError(err).Warn("the service manager was not told that what it kept is taken over")
	}
	if d.stored != nil { // there is never more than one
		_ = d.stored.Close()
	}
	d.stored = stored
}
