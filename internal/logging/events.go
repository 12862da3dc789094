package logging

import "github.com/sirupsen/logrus"

// An Event is a class of entries that an operator tells apart: its id becomes the
// entry's MESSAGE_ID, under which packaging/catalog/castra.catalog says what it means
// and what to do (`journalctl -x`). An id, once released, means the same for ever.
type Event string

// The events, by their ids (`systemd-id128 new`).
const (
	Listening             Event = "624b95f15c37447eb2f92cd11be28789" // castrad accepts connections
	GuestReady            Event = "6fcf6b2159d44ad897b1b562d8384044" // castra-guestd serves programs
	Failed                Event = "afaab137e66045158257559cad1da3d5" // a daemon ends and could not do its work
	WatchdogNotFed        Event = "4b9d490204344e62ba720780f8cff148" // a part did not answer, so systemd is not told that all is well
	NotifyFailed          Event = "9e08858afad3469ea885c573c8493c47" // systemd cannot be told that the daemon is ready
	ConfigurationRead     Event = "a891789d83a84c859e16658f42758543" // a reload took the configuration in
	ConfigurationRefused  Event = "8e2d34d09668449abcd65ace82667ab5" // a reload found mistakes
	ConfigurationDoubtful Event = "0ced99bd6b3e43a4b3bbd13d64ed9454" // the configuration is allowed and hardly meant
	BusServed             Event = "983a9b9617164e3b8fe9f031c0645803" // the name is owned on the message bus
	BusUnavailable        Event = "0c956be37338450ebc00b4ec6ea4be02" // D-Bus is not to be had
	PolkitUnavailable     Event = "0955f7d44c574fbc80c3e0af9215095e" // polkit gives no decision
	PolkitBack            Event = "7bd9bfd5259546ba8cbf960750a5f356" // polkit decides again
	GuestConnected        Event = "9e75b274e08345db8d940315854592f3" // a session begins
	GuestDisconnected     Event = "f3e4c65e67ce4c5286cac12f97d236dc" // a session ends
	GuestSuperseded       Event = "e87e723dcccb4dab8bf2bc02bff27451" // a newer session took a session's place
	GuestRefused          Event = "5889bc7476514b0a817e610e14a6fbdc" // a handshake granted nothing
	AcceptFailed          Event = "167cf84cf31848b3996cfb29abeabc74" // a connection could not be taken
	VMAdded               Event = "0541bb78121343939db58c7b10a14168" // a VM was registered
	VMRemoved             Event = "57b6b872691343c7ba917e1dbde93953" // a VM's registration was removed
	VMRekeyed             Event = "0d28c8a1496f4d119732a602da3e499d" // a VM has a new key
	RegistrationIgnored   Event = "6c081c19b6a6427485d54c62a7f3df8a" // a registration cannot be used
	StorageDegraded       Event = "7d025aecc12e4128a9d66d1174b71bf6" // the event log takes no records
	StorageDoubtful       Event = "59c10fca415d4b0a80a19afec5149021" // the file system may lose what was synced
	StorageRecovered      Event = "50061a8beb4b4fa29b6218ff61c99508" // the event log takes records again
	VMStreamsBehind       Event = "4495cde9909546d1b991ad947ddd7fe5" // the VMs' streams are not written
	VMStreamsComplete     Event = "bfee3842dd7b41c5b28a0c82a675d3d3" // the VMs' streams are written again
	RecordDamaged         Event = "a8ca2f8eca224789aa76dd5e7c03734d" // a record on disk is not what was written
	WriteCutOff           Event = "bae09e83aa7248dbad16a5e2d86895ac" // recovery cut off an unfinished write
	ExpiryFailed          Event = "83c0d2c8b6d34427b5646115fe24e382" // old segments cannot be removed
	CursorsNotStored      Event = "d9201cd813294b91ac760b0c16b1cf1f" // cursors cannot be stored
	CursorBeyondEnd       Event = "4834197d388f431ba265c0de7eae3c7f" // a cursor points behind the newest record
	HandshakesNotRecorded Event = "b983ae7a37234887aa33d9f37e481730" // the files about handshakes cannot be written
	PresenceUnknown       Event = "155a5585d43045b5aa24c7363ed81694" // who was reachable before is not known
	SessionsHandedOver    Event = "5c65783e354041f48abad611d135b7b3" // sessions wait for the next castrad
	SessionsTakenOver     Event = "f3bf822bcdc74fb5b366ac4c49283156" // sessions go on that began with another castrad
	HandOverFailed        Event = "ef115254a46e4238b3492468a71463e5" // sessions end with castrad
	SessionNotHandedOver  Event = "36056ee1f15340e9bc377e6772aa3a39" // one session ends with castrad
	HostConnected         Event = "228f0061270f41af87b8f3b57a8aae8b" // the guest's session begins
	HostUnreachable       Event = "411c8f384da142369bfd9a95d5c78b16" // there is no session with the host
	HostRefused           Event = "24b2aedf61a74b45b8a840b4aeb23a38" // the host does not take this VM
	HostMoved             Event = "83e266fead9b4cf7921fd63cbe36a37a" // the host's address is another
	MessagesLost          Event = "ab7ecfbfbc634cf3ad2057bef7583a5c" // what was kept for the host is lost
	SubscriptionRefused   Event = "ec29c1820cc34efd8be09f87ae4ffdde" // the host refuses a configured subscription
	RecordsMissed         Event = "f8caea83fcff470eacf412c54e39855b" // there are records that this guest will not hear
	StateSetAside         Event = "d590827523fc4410aa4cd0faf87f23e7" // what stood where castrad keeps a file was renamed
	LimitReached          Event = "7d9c7dd5f5b04763bc422850f6b21327" // a limit was reached
	RefusalsWithheld      Event = "c6be0166432a462385e451a389ef45ae" // more refusals than are logged one by one
	StrangersForgotten    Event = "dc8443c57fe305efc6ed255fa295909e" // files of names that nobody registered were removed
	CursorsUnreadable     Event = "aa0c3cf9e3a24632baeb6f5205c82371" // a VM's file of cursors cannot be read
	CursorsStored         Event = "9adb6dfc856741078e2a22362678bc6b" // cursors are stored again
	SpoolInMemory         Event = "d894d27928234b5babac117c27d717b5" // the spool on disk is not to be had
	SpoolFound            Event = "b0bfb7a78a814deaae42c5696f35e0de" // the spool holds messages of an earlier run
	SpoolOther            Event = "af85facc1deb42c293b6b0c96c86fe00" // a spool holds another VM's messages
	SpoolDegraded         Event = "050b3df261cb48f19471c6cbaa6e556d" // the spool's disk fails
	SpoolRecovered        Event = "fc9129ef98f246b6b90dc13f6bf9a510" // the spool's disk works again
	SpoolDamaged          Event = "736aeb734c524a10b9ab2fefdb060f70" // a place in the spool is not what was written
	ClientTooSlow         Event = "ed29eb1b840d4c3a9727f1147334c307" // a local program does not read
)

// On gives log for an entry of this event.
func (e Event) On(log logrus.FieldLogger) *logrus.Entry { return log.WithField(MessageID, string(e)) }
