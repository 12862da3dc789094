# shellcheck shell=bash
# Sourced by demo and vm: a private directory in the checkout with processes of one's
# own in it, all of which end, whatever happens, before the script does.

# A service manager or a container that runs us means these for itself.
unset NOTIFY_SOCKET WATCHDOG_USEC WATCHDOG_PID LISTEN_FDS LISTEN_PID LISTEN_FDNAMES \
  JOURNAL_STREAM CREDENTIALS_DIRECTORY STATE_DIRECTORY LOGS_DIRECTORY RUNTIME_DIRECTORY CONFIGURATION_DIRECTORY

lab_pids=()

# lab_open NAME: makes the directory $LAB and sees to its end.
lab_open() {
  mkdir -p .run
  LAB=$(mktemp -d "$PWD/.run/$1.XXXXXX")
  # Sockets are bound in it by path, and sockaddr_un holds 107 bytes.
  if [ ${#LAB} -gt 80 ]; then
    rmdir "$LAB"
    die "the path of this checkout is too long for Unix sockets in it ($LAB)"
  fi
  # A mark, inherited by all that is started here: lab_close finds what escaped by it.
  export CASTRA_LAB=$LAB
  trap lab_close EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
}

die() {
  echo "${0##*/}: $*" >&2
  exit 1
}

# start NAME COMMAND…: runs it in the background, its output in $LAB/NAME.log.
start() {
  local name=$1
  shift
  # A session of its own: Ctrl-C is for the script, which ends its processes in order.
  setsid "$@" </dev/null >"$LAB/$name.log" 2>&1 &
  lab_pids+=($!)
}

# stop PID: asks it to end, insists after 10 s, and waits for it.
stop() {
  local i
  kill -TERM "$1" 2>/dev/null || true
  for ((i = 0; i < 100; i++)); do
    kill -0 "$1" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL "$1" 2>/dev/null || true
  wait "$1" 2>/dev/null || true
}

# until_ok SECONDS COMMAND…: repeats it until it succeeds; fails after so long.
until_ok() {
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.1
  done
}

# lab_left MARK: kills and names the processes that bear it. The script itself does not
# bear $LAB: /proc shows the environment that a process was started with.
lab_left() {
  local p
  for p in /proc/[0-9]*; do
    if grep -qzFx "CASTRA_LAB=$1" "$p/environ" 2>/dev/null; then
      echo "  ${p#/proc/} $(tr '\0' ' ' <"$p/cmdline" 2>/dev/null)"
      kill -KILL "${p#/proc/}"
    fi
  done
}

lab_close() {
  local rc=$? i left
  trap - EXIT
  trap '' INT TERM HUP # a second Ctrl-C must not leave half of it running
  # The daemons go before the message buses that were started for them.
  for ((i = ${#lab_pids[@]} - 1; i >= 0; i--)); do stop "${lab_pids[i]}"; done
  left=$(lab_left "$LAB")
  if [ -n "$left" ]; then
    printf '%s: had to kill:\n%s\n' "${0##*/}" "$left" >&2
    rc=1
  fi
  if [ $rc != 0 ] && [ $rc != 130 ]; then
    tail -n 20 "$LAB"/*.log >&2 || true
  fi
  rm -rf "$LAB"
  rmdir "${LAB%/*}" 2>/dev/null || true # not empty: another lab is open
  exit $rc
}

bus_address() { echo "unix:path=$LAB/$1.bus"; }

# private_bus NAME: starts a message bus for one daemon at bus_address NAME.
private_bus() {
  cat >"$LAB/$1-bus.conf" <<END
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>$(bus_address "$1")</listen>
  <auth>EXTERNAL</auth>
  <policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy>
</busconfig>
END
  start "$1-bus" dbus-daemon --nofork --nopidfile --nosyslog --config-file="$LAB/$1-bus.conf"
  until_ok 10 test -S "$LAB/$1.bus" || die "dbus-daemon did not start"
}

# Prints a TCP port of 127.0.0.1 that nobody listens on: 7070 if it is free.
free_port() {
  local port=7070
  while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((20000 + RANDOM % 10000)); done
  echo $port
}

# start_castrad: starts a castrad on 127.0.0.1:$port, with a message bus of its own at
# bus_address host, that keeps all it has in $LAB; returns when it answers.
start_castrad() {
  port=$(free_port)
  private_bus host
  cat >"$LAB/castrad.toml" <<END
[broker]
listen = ["127.0.0.1:$port"]
vms_dir = "$LAB/vms.d"
[store]
state_dir = "$LAB/state"
log_dir = "$LAB/log"
END
  start castrad env DBUS_SYSTEM_BUS_ADDRESS="$(bus_address host)" castrad --config "$LAB/castrad.toml"
  until_ok 15 env DBUS_SYSTEM_BUS_ADDRESS="$(bus_address host)" castractl status || die "castrad does not answer"
}
