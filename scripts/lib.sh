# shellcheck shell=sh
# What the scripts beside this file share: host packages, the Python environment in .venv, messages.
# The caller has `set -eu`, stands in the top folder of the checkout, and sources this file.
# Everything that is said here goes to standard error.

# Where administrators' programs live: often not on the PATH of an ordinary user.
admin_path=/usr/local/sbin:/usr/sbin:/sbin
debian_keyring=/usr/share/keyrings/debian-archive-keyring.gpg
# The system's own Python is named by its path as well: a version manager may hide it on the PATH.
python_candidates="python3 /usr/bin/python3 python3.15 python3.14 python3.13 python3.12 python3.11"
# Done when the file says what was installed; it says so last of all, so an interrupted set-up is seen as such.
stamp=.venv/pbotvm-setup

say() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
}

die() {
    say "$@"
    exit 1
}

have() { # PROGRAM or /FILE
    case $1 in
    /*) [ -e "$1" ] ;;
    *) (PATH=$PATH:$admin_path && command -v "$1") >/dev/null 2>&1 ;;
    esac
}

# What a purpose needs: program or file, and the package that has it on Debian, Fedora, Arch, openSUSE.
requirements() { # python | run | test
    [ "$1" != python ] || return 0
    cat <<END
qemu-system-x86_64 qemu-system-x86 qemu-system-x86-core qemu-system-x86 qemu-x86
qemu-img qemu-utils qemu-img qemu-img qemu-tools
mmdebstrap mmdebstrap mmdebstrap mmdebstrap mmdebstrap
mke2fs e2fsprogs e2fsprogs e2fsprogs e2fsprogs
tar tar tar tar tar
dpkg dpkg dpkg dpkg dpkg
mount mount util-linux util-linux util-linux
setpriv util-linux util-linux util-linux util-linux
$debian_keyring debian-archive-keyring debian-keyring debian-archive-keyring debian-archive-keyring
END
    if [ "$(id -u)" != 0 ]; then
        cat <<END
fakeroot fakeroot fakeroot fakeroot fakeroot
newuidmap uidmap shadow-utils shadow shadow
END
    fi
    if [ "$1" = test ]; then
        cat <<END
ip iproute2 iproute iproute2 iproute2
nft nftables nftables nftables nftables
dnsmasq dnsmasq-base dnsmasq dnsmasq dnsmasq
iperf3 iperf3 iperf3 iperf3 iperf
cpio cpio cpio cpio cpio
gcc gcc gcc gcc gcc
g++ g++ gcc-c++ gcc gcc-c++
gdb gdb gdb gdb gdb
/usr/include/stdio.h libc6-dev glibc-devel glibc glibc-devel
nc netcat-openbsd nmap-ncat openbsd-netcat netcat-openbsd
systemd-analyze systemd systemd systemd systemd
END
    fi
}

# Sets `missing` to what is not there, and `packages`, `fedora`, `arch`, `suse` to what has it.
find_missing() { # python | run | test
    missing='' packages='' fedora='' arch='' suse=''
    needed=$(requirements "$1")
    while read -r what debian_has fedora_has arch_has suse_has; do
        if [ -z "$what" ] || have "$what"; then
            continue
        fi
        missing="$missing $what" packages="$packages $debian_has"
        fedora="$fedora $fedora_has" arch="$arch $arch_has" suse="$suse $suse_has"
    done <<END
$needed
END
}

# Prints version and path of the Python behind the command: the real one, be it called through a link or another
# virtual environment. Fails when it is too old or cannot make an environment (Debian keeps ensurepip apart).
probe_python() { # COMMAND
    "$1" - 2>/dev/null <<'END'
import sys

if sys.version_info < (3, 11):
    sys.exit(1)
import ensurepip
import venv

print("%d%02d" % sys.version_info[:2], getattr(sys, "_base_executable", None) or sys.executable)
END
}

# Sets `python` to the newest one that will do. $PYTHON, when set, is the only candidate.
find_python() {
    python='' newest=0
    if [ -n "${PYTHON-}" ]; then
        python_candidates=$PYTHON
    fi
    for candidate in $python_candidates; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        answer=$(probe_python "$candidate") || continue
        if [ "${answer%% *}" -gt "$newest" ]; then
            newest=${answer%% *} python=${answer#* }
        fi
    done
    [ -n "$python" ]
}

# Prints the version of a package that apt would install; nothing when apt does not know it.
apt_candidate() { # PACKAGE
    LC_ALL=C apt-cache policy "$1" 2>/dev/null | sed -n -e '/(none)/d' -e 's/^ *Candidate: *//p'
}

# Prints the packages with a new enough Python, preferring the release's own.
apt_python() {
    version=$(apt_candidate python3)
    minor=${version#*:}
    minor=${minor#3.}
    minor=${minor%%[!0-9]*}
    if [ -z "$version" ] || [ "${minor:-0}" -ge 11 ]; then
        echo python3 python3-venv
        return
    fi
    for name in python3.15 python3.14 python3.13 python3.12 python3.11; do
        if [ -n "$(apt_candidate "$name")" ]; then
            echo "$name" "$name-venv"
            return
        fi
    done
    return 1
}

no_python() {
    if [ -n "${PYTHON-}" ]; then
        die "PYTHON=$PYTHON is not a Python 3.11 or newer with the modules venv and ensurepip"
    fi
    die "no Python 3.11 or newer with the modules venv and ensurepip is installed, and apt knows none;" \
        "install one by other means and say which: PYTHON=/path/to/python3 $0"
}

# Runs apt-get as root. Others may hold its lock, as the updater does in a host's first minutes: wait for them.
run_apt() {
    set -- apt-get -q -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 "$@"
    if [ "$(id -u)" = 0 ]; then
        DEBIAN_FRONTEND=noninteractive "$@" >&2
    else
        sudo env DEBIAN_FRONTEND=noninteractive "$@" >&2
    fi
}

# Ends with what an administrator has to type.
die_for_root() { # REASON
    say "$1; run this as root, then type $0 again:"
    printf '    %s\n' "apt-get update" "apt-get install -y --no-install-recommends ${packages# }" >&2
    exit 1
}

without_apt() {
    say "this host lacks:$missing"
    say "there is no apt-get here to install that with; install it by hand, then type $0 again. Typical package names:"
    printf '    %s\n' "Fedora:   dnf install$fedora" "Arch:     pacman -S$arch (mmdebstrap: from the AUR)" \
        "openSUSE: zypper install$suse" >&2
    case $missing in
    *mmdebstrap*) say "mmdebstrap builds the guest image: where it is not packaged, copy the cache folder pbotvm-qemu/images from a host that has it" ;;
    esac
    exit 1
}

# Installs what the purpose needs; `want_python` says whether a Python is to be found or installed, too.
set_up_host() { # python | run | test
    find_missing "$1"
    lacks_python=''
    if [ -n "$want_python" ] && ! find_python; then
        [ -z "${PYTHON-}" ] || no_python
        lacks_python=yes
        missing=" python3 (3.11 or newer, with venv and ensurepip)$missing"
        fedora=" python3$fedora" arch=" python$arch" suse=" python313$suse"
    fi
    [ -n "$missing" ] || return 0
    have apt-get || without_apt

    say "this host lacks:$missing"
    if [ "$(id -u)" != 0 ]; then
        ! have sudo || say "installing needs root: sudo may ask for your password"
        if ! have sudo || ! sudo env true; then
            [ -z "$lacks_python" ] || packages="$(apt_python)$packages" || no_python
            die_for_root "there is no sudo here that lets you install that"
        fi
    fi
    say "reading the package lists (apt-get update)"
    run_apt update || say "apt-get update failed (see above); trying with the lists that are there"
    [ -z "$lacks_python" ] || packages="$(apt_python)$packages" || no_python
    say "installing these packages, and what they depend on: ${packages# }"
    # shellcheck disable=SC2086  # a list of words
    run_apt install -y --no-install-recommends $packages ||
        die "apt-get could not install them; its reason is above. If it does not know a package, its part of the" \
            "archive is switched off (on Ubuntu: add-apt-repository universe); mend that, then type $0 again"
    find_missing "$1"
    [ -z "$missing" ] || die "still missing after the packages were installed:$missing"
    [ -z "$lacks_python" ] || find_python || no_python
}

# Prints what .venv must have been made from: its Python, this project file, these extras, this place.
expected_stamp() { # EXTRAS
    version=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || return 1
    printf 'python=%s place=%s project=%s extras=%s\n' "$version" "$(pwd -P)" "$(cksum <pyproject.toml | tr ' ' -)" "$1"
}

# Sets `venv` to good, outdated or absent (so is a broken one), and `extras` to what to install.
judge_venv() { # EXTRAS
    venv=absent extras=$1 known=''
    [ ! -f "$stamp" ] || known=$(cat "$stamp")
    case $known in
    *extras=dev) extras=dev ;; # not taken away when only less is asked for
    esac
    now=$(expected_stamp "$extras") || return 0
    if [ "$known" = "$now" ]; then
        venv=good
    elif [ "${known%% project=*}" = "${now%% project=*}" ]; then
        venv=outdated
    elif [ ! -e "$stamp" ] && .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        venv=outdated # made by hand: it is completed, not thrown away
    fi
}

set_up_venv() {
    if [ "$venv" = absent ]; then
        say "making .venv with $python"
        rm -rf .venv || die "cannot remove the old .venv: is it another user's?"
        mkdir .venv || die "cannot make .venv in $PWD: may you write here?"
        : >"$stamp" # empty until the end: .venv is not finished
        "$python" -m venv .venv >&2 || die "$python cannot make .venv: see above"
    fi
    say "installing the project and its Python packages into .venv (may take a minute)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
        -e ".${extras:+[$extras]}" </dev/null >&2 ||
        die "pip failed: its reason is above. Without a way to the package index, tell pip of your mirror or proxy" \
            "(PIP_INDEX_URL, https_proxy, or pip.conf), then type $0 again"
    expected_stamp "$extras" >"$stamp.new" || die "cannot write $stamp"
    mv "$stamp.new" "$stamp"
}

# Makes the host and .venv ready; does nothing, quickly, when they are.
set_up() { # python | run | test, EXTRAS ('' or dev)
    # Two set-ups at once would spoil each other's .venv: the second one waits.
    exec 9<pyproject.toml
    ! have flock || flock 9
    judge_venv "$2"
    want_python=''
    [ "$venv" != absent ] || want_python=yes
    set_up_host "$1"
    [ "$venv" = good ] || set_up_venv
    exec 9<&-
}

# Runs pytest on the folder, or on those of its files that the arguments name.
run_pytest() { # FOLDER [ARGUMENT...]
    folder=$1
    shift
    for argument; do
        case $argument in
        tests/* | ./* | /*) [ ! -e "${argument%%::*}" ] || folder='' ;;
        esac
    done
    .venv/bin/python -m pytest ${folder:+"$folder"} "$@"
}
