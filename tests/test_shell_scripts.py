"""The scripts run in the bash and with the tools of every system: macOS has bash 3.2 of 2007 and BSD's tools."""

import re

import pytest
from repository import ROOT

SCRIPTS = sorted(
    path for folder in ("launch", "benchmarks") for path in (ROOT / folder).iterdir()
    if path.suffix in (".sh", ".sbatch") or path.name == "deepspeed"
)  # fmt: skip

_START = r"(?:^|[;&|({`]|\b(?:then|do|else|exec|!|if|while)\b)\s*"
"""Where a command can stand."""

CONSTRUCTS = {
    # what macOS lacks: how it is found, and examples of it
    "mapfile": (_START + r"(?:mapfile|readarray)\b", "mapfile -t hosts < <(list)", "readarray a"),
    "case of a value": (r"\$\{!?\w+(?:\[[^]]*\])?(?:,|\^)", 'name="${name,,}"', 'name="${name^}"'),
    "transformed value": (r"\$\{[^}]*@[QEPAaKULu]\}", 'echo "${words@Q}"'),
    "kind of variable": (r"\b(?:declare|local|typeset)\s+-\w*[Ang]", "declare -A sizes", "local -n other=$1"),
    "wait for any": (r"\bwait\s+-n\b", "wait -n"),
    "pipe of both outputs": (r"\|&|&>>", "make |& tee log", "make &>>log"),
    "time by printf": (r"%\([^)]*\)T", "printf '%(%H:%M)T' -1"),
    "place from the end": (r"\$\{\w+\[-\d|\$\{\w+:[^}:]*:\s*-\d", 'last="${words[-1]}"', 'name="${name:0:-3}"'),
    "test of a variable": (r"\[\[[^]]*\s-[vR]\s", "if [[ -v name ]]; then :; fi"),
    "coproc": (_START + r"coproc\b", "coproc worker { cat; }"),
    "fall through a case": (r";;?&", "a) echo a ;;& esac", "a) echo a ;& esac"),
    "descriptor in a variable": (r"\{\w+\}[<>]", "exec {log}>file"),
    "option of bash 4": (r"shopt\s+-\w\s+.*\b(?:globstar|lastpipe|inherit_errexit)", "shopt -s globstar"),
    "variable of bash 4": (r"\$\{?(?:BASHPID|EPOCHSECONDS|EPOCHREALTIME|SRANDOM)\b", "echo $BASHPID"),
    "flag of read": (r"\bread\b[^;|]*\s-(?:[iN]\b|t\s*0?\.)", "read -N 4 word", "read -t 0.5 word"),
    "tool of GNU or Linux": (
        _START + r"(?:env (?:-u \w+ )*)?(?:nproc|(?:sha\d+|md5)sum|realpath|timeout|setsid|flock|tac|shuf|numfmt|"
        r"lscpu|free|ldd|getent|taskset|numactl|pidof|stdbuf|truncate)\b",
        'workers="$(nproc)"', "env -u A nproc", "cat a | sha256sum", "timeout 5 make", "a && realpath b", "then tac x",
    ),
    "flag of GNU": (
        r"\b(?:readlink\s+-\w*[efm]|sed\s+(?:-\w+\s+)*-\w*[irz]|date\s+-\w*[dI]|stat\s+-\w*c|grep\s+-\w*P|"
        r"xargs\s+-\w*[rd]|sort\s+-\w*[Vhz]|(?:cp|mv|ln)\s+-\w*[tTr]\b|(?:head|tail)\s+-\w*c\s*\d+[kKMG]|head\s+-n\s*-|"
        r"mktemp\s+-\w*p|du\s+-\w*b|df\s+-\w*B|find\s.*-(?:printf|readable)|find\s+-|base64\s+-\w*w|touch\s+-\w*d|"
        r"(?:cat|chmod|cp|cut|date|du|find|head|ls|ln|mkdir|mktemp|mv|rm|sort|stat|tail|touch|tr|wc)\s+--)",
        "readlink -f a", "sed -i s/a/b/ a", "sed -n -r a", "date -d now", "stat -c %s a", "grep -oP a", "xargs -r rm",
        "sort -V", "cp -t a b", "head -c 1K", "head -n -1", "mktemp -p a", "find a -printf %p", "cp -- a b", "ls --all",
    ),
    "Linux's folder": (r"(?<![\w.])/proc/(?!cpuinfo \|\|)|/dev/shm|/sys/", "cat /proc/meminfo", "ls /dev/shm"),
}  # fmt: skip


def find_constructs(script: str) -> list[str]:
    """What a script uses that macOS has not, each with its line."""
    lines = [re.sub(r"(?:^|\s)#.*", "", line) for line in script.splitlines()]
    found = [
        f"{name}: {line.strip()}"
        for line in lines
        for name, (pattern, *_) in CONSTRUCTS.items()
        if re.search(pattern, line)
    ]
    if any(re.match(r"\s*set -\w*u", line) for line in lines):
        # To bash before 4.4 an array without elements is a variable that is not set.
        empty = set(re.findall(r"\b(\w+)=\(\)", "\n".join(lines)))
        found += [
            f"empty array under set -u: {line.strip()}" for line in lines for name in empty
            if re.search(r"(?<!\+)(?<!\+\")\$\{" + name + r"\[[@*]\]\}", line)
        ]  # fmt: skip
    return found


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_each_construct_is_found(name):
    for example in CONSTRUCTS[name][1:]:
        assert f"{name}: {example}" in find_constructs(example)


def test_what_is_common_to_all_is_not_found():
    common = (
        'set -euo pipefail\nflags=() # mapfile\nread -r a b <<<"$x"\nfind . -name x -mmin +3 -delete\ngrep -m 1 -E a\n'
    )
    common += (
        'a+=(b)\necho "${@:2}" "${x:0:3}" "${#flags[@]}" ${flags[@]+"${flags[@]}"} "${x%%.*}" $((1 - 2))\ncut -c 1-3'
    )
    assert find_constructs(common) == []
    assert find_constructs('set -eu\nflags=()\nrun "${flags[@]}"') == ['empty array under set -u: run "${flags[@]}"']


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_script_needs_more_than_every_system_has(script):
    assert find_constructs(script.read_text(encoding="utf-8")) == []
