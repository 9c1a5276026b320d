#!/usr/bin/env bash
# A real SLURM cluster of several nodes on this machine, to try multi-node runs on a laptop. Needs root, not systemd.
#
#   slurm/local_cluster.sh install        Install SLURM and munge with apt, if missing.
#   slurm/local_cluster.sh up [N] [--net] Start N nodes n1, n2, ... (2), and print the variable that sbatch needs.
#   slurm/local_cluster.sh status         Print nodes and jobs.
#   slurm/local_cluster.sh exec I CMD...  Run a command as if on node I.
#
#   slurm/local_cluster.sh node-down I    Crash node I: kill its daemon and all its processes.
#   slurm/local_cluster.sh node-up I      Start node I again.
#
#   slurm/local_cluster.sh down           Cancel all jobs and stop all processes of `up`.
#
# Each node is a slurmd with its own host name and /etc/hosts, all at 127.0.0.1. With --net each node has its own
# network, 10.N.0.I, behind a bridge. Partitions: main, and high, whose jobs preempt the jobs in main.
#
# QLORA_SLURM_DIR: folder of its state (qlora-dist-slurm-UID in XDG_RUNTIME_DIR or /tmp).
# QLORA_SLURM_PORT: first of its 300 ports (16800). Another folder with other ports is another cluster.
# QLORA_SLURM_CPUS, QLORA_SLURM_MEMORY (MiB), QLORA_SLURM_GPUS: size that each node reports (8, 16384, 0).
# QLORA_SLURM_NODE_TIMEOUT: seconds after which a silent node counts as down (10).
set -euo pipefail

dir=${QLORA_SLURM_DIR:-${XDG_RUNTIME_DIR:-/tmp}/qlora-dist-slurm-$UID}
port=${QLORA_SLURM_PORT:-16800}
cpus=${QLORA_SLURM_CPUS:-8} memory=${QLORA_SLURM_MEMORY:-16384} gpus=${QLORA_SLURM_GPUS:-0}
host=$(hostname -s)
export SLURM_CONF=$dir/slurm.conf

fail() { echo "local_cluster.sh: $*" >&2; exit 1; }
have() { command -v "$1" >/dev/null; }
running() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }
network() { echo $((port / 300 % 200 + 20)); } # network of --net, different for each cluster
with_net() { [ -e "$dir/net" ]; }
address() { if with_net; then echo "10.$(network).0.$1"; else echo 127.0.0.1; fi; }

install() {
  if have slurmctld && have slurmd && have sbatch && have munged; then return; fi
  have apt-get || fail "install SLURM (slurmctld, slurmd, sbatch) and munge with this system's package manager"
  [ "$UID" = 0 ] || fail "run this as root: it installs slurmctld, slurmd, slurm-client and munge by apt"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  # without recommended packages, which would be 40 more
  apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge iproute2 >/dev/null
}

write_conf() { # N
  local bind="" gres="" i
  # The daemons run jobs as root, so they listen only on this machine if the host's name resolves to it.
  if ! with_net && [ "$(getent ahostsv4 "$host" | awk '{print $1; exit}')" = 127.0.0.1 ]; then
    bind=CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
  fi
  if [ "$gpus" -gt 0 ]; then
    gres=" Gres=gpu:$gpus"
    for ((i = 0; i < gpus; i++)); do mknod "$dir/run/gpu$i" c 1 3; done # a GPU is a device file, and /dev/null serves as one
    echo "NodeName=n[1-$1] Name=gpu File=$dir/run/gpu[0-$((gpus - 1))]" > "$dir/gres.conf"
  else
    rm -f "$dir/gres.conf"
  fi
  cat > "$SLURM_CONF" <<END
ClusterName=local
SlurmctldHost=$host($(address 254))
SlurmctldPort=$port
# The rendezvous port depends on the job's number, and this machine may run jobs of another cluster too.
FirstJobId=$((port / 300))001
SrunPortRange=$((port + 100))-$((port + 299))
$bind
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also the time that a requeued job waits; 5 is the minimum
AuthInfo=socket=$dir/munge/socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
# also reaches torchrun's ranks, which have their own sessions
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=1
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
PropagateResourceLimits=NONE
SlurmdTimeout=${QLORA_SLURM_NODE_TIMEOUT:-10}
InactiveLimit=0
MinJobAge=3600
UnkillableStepTimeout=20
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# nodes may report a larger size than this machine has
SlurmdParameters=config_overrides
$([ "$gpus" = 0 ] || echo GresTypes=gpu)
$(for ((i = 1; i <= $1; i++)); do
    echo "NodeName=n$i NodeHostname=n$i NodeAddr=$(address "$i") Port=$((port + i)) CPUs=$cpus RealMemory=$memory$gres"
  done)
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
END
  for ((i = 1; i <= $1; i++)); do # the node's name comes first, so that it resolves to that and not to localhost
    { with_net || echo "127.0.0.1 n$i"
      printf '127.0.0.1 localhost\n%s %s\n' "$(address 254)" "$host"
      for ((j = 1; j <= $1; j++)); do echo "$(address "$j") n$j"; done; } > "$dir/hosts.n$i"
  done
}

start_node() { # I
  local enter=()
  ! with_net || enter=(nsenter --net="/run/netns/qlora$(network)-$1") # `ip netns exec` would hide /sys/fs/cgroup
  # shellcheck disable=SC2016  # the inner shell expands it
  "${enter[@]}" unshare --mount --uts --propagation private bash -c \
    'hostname "$1"; mount --bind "$2" /etc/hosts; readlink /proc/$$/ns/uts > "$3"; exec slurmd -f "$SLURM_CONF" -N "$1"' \
    _ "n$1" "$dir/hosts.n$1" "$dir/run/n$1.namespace"
}

in_node() { # I CMD...
  running "$dir/run/n$1.pid" || fail "there is no node n$1 running"
  local enter=(--mount --uts)
  ! with_net || enter+=(--net)
  exec nsenter --target "$(cat "$dir/run/n$1.pid")" "${enter[@]}" --wd="$PWD" "${@:2}"
}

kill_node() { # I: kill all processes on the node
  local namespace process
  [ -s "$dir/run/n$1.namespace" ] || return 0
  namespace=$(cat "$dir/run/n$1.namespace")
  for process in /proc/[0-9]*; do
    if [ "$(readlink "$process/ns/uts" 2>/dev/null)" = "$namespace" ]; then
      kill -9 "${process#/proc/}" 2>/dev/null || true
    fi
  done
  rm -f "$dir/run/n$1.namespace" # the kernel may reuse the number
}

net_up() { # N
  local net bridge i
  net=$(network) bridge=qlorabr$(network)
  ip link add "$bridge" type bridge
  ip addr add "10.$net.0.254/24" dev "$bridge"
  ip link set "$bridge" up
  for ((i = 1; i <= $1; i++)); do
    ip netns add "qlora$net-$i"
    ip link add "qlora$net-$i" type veth peer name eth0 netns "qlora$net-$i"
    ip link set "qlora$net-$i" master "$bridge" up
    ip -n "qlora$net-$i" addr add "10.$net.0.$i/24" dev eth0
    ip -n "qlora$net-$i" link set lo up
    ip -n "qlora$net-$i" link set eth0 up
  done
}

net_down() {
  local name
  for name in $(ip netns list | awk -v name="qlora$(network)-" 'index($1, name) == 1 {print $1}'); do
    ip netns del "$name"
  done
  ip link del "qlorabr$(network)" 2>/dev/null || true
}

up() {
  local n=2 i tries=0
  for i in "$@"; do if [ "$i" = --net ]; then local net=1; else n=$i; fi; done
  [[ $n =~ ^[1-9][0-9]?$ ]] || fail "up takes a number of nodes, 1 to 99, not $n"
  [ "$UID" = 0 ] || fail "run this as root: nodes have host names and files of their own"
  if ! have slurmctld || ! have slurmd || ! have munged; then fail "SLURM is not installed; run $0 install"; fi
  # slurmstepd's sockets are in there, and a socket's path has at most 108 characters
  [ ${#dir} -le 70 ] || fail "$dir is too long a path for sockets; set QLORA_SLURM_DIR to one of at most 70 characters"
  ! running "$dir/run/slurmctld.pid" || fail "a cluster runs in $dir already; take it down, or set QLORA_SLURM_DIR"
  mkdir -p "$dir"
  [ -O "$dir" ] || fail "$dir belongs to somebody else; set QLORA_SLURM_DIR"
  rm -rf "${dir:?}"/{state,spool,log,run,net} # a new cluster
  mkdir -p "$dir"/{state,spool,log,run,munge}
  chmod 755 "$dir" "$dir/run" "$dir/munge"
  # on a machine with only 127.0.0.1 getaddrinfo, which SLURM uses, returns no IPv4 address
  if have ip && ! ip -4 -o addr | grep -qv ' 127\.0\.0\.1/'; then ip addr add 127.0.0.2/8 dev lo; fi
  if [ -n "${net:-}" ]; then
    have ip || fail "--net needs iproute2; install it"
    net_down
    touch "$dir/net"
    net_up "$n"
  fi
  write_conf "$n"
  (umask 077; head -c 1024 /dev/urandom > "$dir/munge/key")
  munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" 2> "$dir/log/start.log" \
    || { cat "$dir/log/start.log" >&2; fail "munge did not start"; }
  slurmctld -f "$SLURM_CONF" 2>> "$dir/log/start.log"
  for ((i = 1; i <= n; i++)); do start_node "$i" 2>> "$dir/log/start.log"; done
  until [ "$(timeout 5 sinfo -h -N -p main -t idle -o %N 2>/dev/null | wc -l)" = "$n" ]; do
    if ! running "$dir/run/slurmctld.pid" || [ $((tries++)) -ge 100 ]; then
      tail -n 5 "$dir"/log/* >&2
      fail "the cluster did not come up; the ends of its logs are above"
    fi
    sleep 0.1
  done
  echo "export SLURM_CONF=$SLURM_CONF"
}

down() {
  [ -e "$SLURM_CONF" ] || return 0
  local file i pids=()
  if running "$dir/run/slurmctld.pid"; then
    timeout 10 scancel --full --user="$(id -un)" 2>/dev/null || true
    for ((i = 0; i < 25; i++)); do [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] || break; sleep 0.2; done
  fi
  for file in "$dir"/run/n*.namespace; do # includes processes that a job has left behind
    file=${file##*/n} && kill_node "${file%.namespace}"
  done
  for file in "$dir/run/slurmctld.pid" "$dir/run/munged.pid"; do
    if running "$file"; then pids+=("$(cat "$file")"); kill "$(cat "$file")" 2>/dev/null || true; fi
  done
  for file in "${pids[@]}"; do
    for ((i = 0; i < 50; i++)); do kill -0 "$file" 2>/dev/null || continue 2; sleep 0.1; done
    kill -9 "$file" 2>/dev/null || true
  done
  if with_net; then net_down; fi
}

command=${1:-}
shift || true
case $command in
  install) install ;;
  up) up "$@" ;;
  down) down ;;
  status) running "$dir/run/slurmctld.pid" || fail "no cluster runs in $dir"
    timeout 10 sinfo -N -o '%N %T' && timeout 10 squeue ;;
  node-down) kill_node "$1" ;;
  node-up) start_node "$1" ;;
  exec) in_node "$@" ;;
  *) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
