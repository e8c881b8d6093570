"""The command line without a kernel: usage, exit statuses, what becomes of names and files."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from probefleet_agent import doctor
from probefleet_cli import interruption, local_pods, main, one_process, options, screen, selectors, sources
from probefleet_cli.failures import BadInput
from probefleet_core import catalog as catalog_module
from probefleet_core import planner, result
from probefleet_core.parameters import Parameter, ParameterType
from probefleet_wire.v1 import plan_pb2

UID = "0f1e2d3c-0000-4000-8000-123456789abc"
CONTAINER = "ab" * 32


def probe(name: str, *parameters: str) -> catalog_module.Probe:
    return catalog_module.Probe(
        name=name,
        title="A title",
        description="What it does.",
        identity=catalog_module.Identity.CURRENT,
        identity_says="The task that runs.",
        parameters=tuple(Parameter(each, ParameterType.INTEGER, "0", "A number.") for each in parameters),
        programs=(),
        maps=(),
        outputs=(),
        elf=b"",
        sha256="",
    )


CATALOG = catalog_module.Catalog({"runqlat": probe("runqlat", "pid"), "syscount": probe("syscount")})


def read(*words: str, settings: dict[str, str] | None = None, interval: str | None = None) -> list[sources.Source]:
    return sources.read(words, catalog=CATALOG, settings=settings or {}, interval=interval)


def status_of(*arguments: str, program: str = "probefleet") -> int:
    return main.invoke(main.command_for(program), arguments, program=program)


def test_the_name_decides_which_commands_come_first() -> None:
    assert {"run", "check", "explain", "doctor", "catalog", "purge", "cluster"} <= main.machine.commands.keys()
    plugin = main.command_for("kubectl-probefleet")
    assert {"run", "events", "nodes", "catalog"} <= plugin.commands.keys()
    assert "doctor" not in plugin.commands and main.command_for("probefleet") is main.machine


def test_who_has_only_the_plugin_needs_no_grpc() -> None:
    program = "import sys; sys.modules['grpc'] = None; from probefleet_cli import main; print(*main.cluster.commands)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert {"run", "events", "nodes"} <= set(done.stdout.split()), done.stderr


@pytest.mark.parametrize("command", sorted({*main.machine.commands} - {"cluster"}))
def test_every_command_explains_itself(command: str) -> None:
    said = CliRunner().invoke(main.machine, [command, "--help"])
    assert said.exit_code == 0
    first = said.output.splitlines()[2].strip()
    assert len(first) > 20, "the first line says what it is for"


def test_the_help_of_run_names_every_option() -> None:
    said = CliRunner().invoke(main.machine, ["run", "--help"]).output
    shown = set(re.findall(r"^\s+(?:-\w, )?(--[a-z-]+)", said, re.MULTILINE))
    whose = {"--namespace", "--selector", "--runtime-endpoint", "--pid", "--by", "--bpffs", "--cgroup-root"}
    assert shown == whose | {"--for", "--interval", "--set", "--output", "--wide", "--help"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nonsense",), "No such command 'nonsense'"),
        (("run",), "Missing argument"),
        (("run", "x", "--for", "10"), "a duration is a whole number and a unit"),
        (("run", "x", "--output", "xml"), "'xml' is not one of"),
        (("run", "/nowhere/policy.yaml"), "/nowhere/policy.yaml: cannot be read"),
    ],
)
def test_wrong_usage_ends_with_2(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "load_catalog", lambda: CATALOG)
    assert status_of(*arguments) == 2
    assert words in capsys.readouterr().err


def test_a_mistake_of_ours_ends_with_1_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> catalog_module.Catalog:
        raise KeyError("oops")

    monkeypatch.setattr(sources, "load_catalog", broken)
    assert status_of("catalog") == 1
    assert "a mistake of ours: KeyError: 'oops'" in capsys.readouterr().err


def test_the_catalog_lists_probes_and_documents_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "load_catalog", lambda: CATALOG)
    assert status_of("catalog") == 0
    assert capsys.readouterr().out.startswith("runqlat   A title\nsyscount  A title\n")
    assert status_of("catalog", "runqlat") == 0
    said = capsys.readouterr().out
    assert "Whose events: The task that runs." in said and "pid: integer, default 0. A number." in said
    assert status_of("catalog", "runqlta") == 2
    assert "Did you mean runqlat?" in capsys.readouterr().err


def test_documentation_and_findings_fit_eighty_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for probe in sources.load_catalog().names:
        assert status_of("catalog", probe) == 0
    found = doctor.Check("features", doctor.Level.WARN, "has " + ", ".join(["ring_buffer"] * 23), "Do this. " * 23)
    monkeypatch.setattr(doctor, "checks", lambda: [found])
    assert status_of("doctor") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 200 and max(map(len, lines)) <= 80
    assert lines[-1].startswith(" " * 18) and lines[-1].endswith("Do this.")


def test_a_name_becomes_the_policy_that_a_user_would_write() -> None:
    (source,) = read("runqlat", settings={"pid": "5"}, interval="5s")
    assert source.where == "catalog runqlat"
    assert source.manifest == {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbePolicy",
        "metadata": {"name": "runqlat"},
        "spec": {
            "scope": "Cluster",
            "program": {"catalog": {"name": "runqlat", "parameters": {"pid": "5"}}},
            "interval": "5s",
        },
    }


def test_a_file_may_have_several_objects_and_lists(tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(
        "kind: ProbeMap\nmetadata: {name: m}\n---\n"
        "kind: List\nitems:\n- kind: ProbePolicy\n  metadata: {name: a}\n- kind: ProbePolicy\n  metadata: {name: b}\n"
    )
    assert [(each.kind, each.manifest["metadata"]["name"]) for each in read(str(path))] == [
        ("ProbeMap", "m"),
        ("ProbePolicy", "a"),
        ("ProbePolicy", "b"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no object in it"),
        ("a: [", "this is not YAML"),
        ("kind: Pod\n", "kind 'Pod': only ProbePolicy and ProbeMap"),
        ("- 1\n", "this is no object of Kubernetes, for it has no kind"),
        ("kind: ProbePolicy\nmetadata: {name: a}\n---\nkind: ProbePolicy\nmetadata: {name: a}\n", "'a' is in"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=re.escape(words)) as refusal:
        read(str(path))
    assert str(path) in str(refusal.value)


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(BadInput, match="Did you mean syscount"):
        read("syscuont")


def test_set_needs_a_catalog_probe(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("kind: ProbePolicy\nmetadata: {name: a}\nspec: {program: {c: {source: x}}}\n")
    with pytest.raises(BadInput, match="there is none here"):
        read(str(path), settings={"minimum": "1ms"})
    assert sources.parse_settings(["a=1", "b=x=y", "a=2"]) == {"a": "2", "b": "x=y"}
    with pytest.raises(BadInput, match="no parameter=value"):
        sources.parse_settings(["minimum"])


def planned(**instance: object) -> planner.Planned:
    made = plan_pb2.Plan(instance=plan_pb2.Instance(**instance))
    return planner.Planned(made, {}, (), planner.Summary((), (), 0, (), ()))


def test_pid_goes_to_uprobes_and_is_refused_where_a_program_cannot_tell() -> None:
    uprobe = plan_pb2.Attachment(program="f", uprobe=plan_pb2.Uprobe(path="/bin/x", symbol="main"))
    by_uprobe = planned(attachments=[uprobe], bcc=plan_pb2.BccSource(source="int f() { return 0; }"))
    one_process.restrict(by_uprobe, 7, "here")
    assert by_uprobe.plan.instance.attachments[0].uprobe.pid == 7
    silent = planned(bcc=plan_pb2.BccSource(source="int kprobe__x() { return 0; }"))
    with pytest.raises(BadInput, match="here: --pid 7: this program does not say"):
        one_process.restrict(silent, 7, "here")


def test_bcc_learns_the_process_without_moving_a_line() -> None:
    asking = planned(bcc=plan_pb2.BccSource(source="int f() { return probefleet_selected_process(1); }"))
    one_process.restrict(asking, 7, "here")
    head, source = asking.plan.instance.bcc.source.split("#line 1\n")
    assert "#define PROBEFLEET_TGID 7" in head and source.startswith("int f()")


def test_pid_has_to_be_a_process_of_this_machine(tmp_path: Path) -> None:
    def proc(namespace: str) -> Path:
        root = tmp_path / namespace
        (root / "self/ns").mkdir(parents=True)
        (root / "self/ns/pid").symlink_to(namespace)
        for number, leader in ((5, 5), (6, 5)):
            (root / str(number)).mkdir()
            (root / str(number) / "status").write_text(f"Name:\tx\nTgid:\t{leader}\n")
        return root

    host = proc(one_process.FIRST_NAMESPACE)
    one_process.check(5, proc=host)
    with pytest.raises(BadInput, match="thread of process 5"):
        one_process.check(6, proc=host)
    with pytest.raises(BadInput, match="no process with this number"):
        one_process.check(7, proc=host)
    with pytest.raises(BadInput, match="pid namespace"):
        one_process.check(5, proc=proc("pid:[1]"))


def test_pods_of_this_machine_are_found_by_the_kubelets_names(tmp_path: Path) -> None:
    (tmp_path / "pods" / f"shop_web-1_{UID}" / "nginx").mkdir(parents=True)
    (tmp_path / "pods" / "nonsense").mkdir()
    (tmp_path / "containers").mkdir()
    (tmp_path / "containers" / f"web-1_shop_nginx-{CONTAINER}.log").touch()
    found = local_pods.find(tmp_path / "pods", tmp_path / "containers")
    assert found.chosen("shop") == (UID,) and found.chosen("other") == ()
    pod = found.name_of(UID)
    assert pod is not None and (pod.name, dict(pod.containers)) == ("web-1", {CONTAINER: "nginx"})
    assert local_pods.find(tmp_path / "none", tmp_path / "none").namespaces == ()


def test_selectors_are_read_as_kubectl_reads_them() -> None:
    assert selectors.parse("app=web, tier in (a, b),!old,zone!=x,new") == {
        "matchLabels": {"app": "web"},
        "matchExpressions": [
            {"key": "tier", "operator": "In", "values": ["a", "b"]},
            {"key": "old", "operator": "DoesNotExist"},
            {"key": "zone", "operator": "NotIn", "values": ["x"]},
            {"key": "new", "operator": "Exists"},
        ],
    }
    with pytest.raises(BadInput, match="is no requirement"):
        selectors.parse("app=web,=x")
    assert selectors.parse("app=web,app=db") == {
        "matchLabels": {"app": "web"},
        "matchExpressions": [{"key": "app", "operator": "In", "values": ["db"]}],
    }, "no pod has both"


def test_the_first_signal_ends_a_wait_and_the_second_everything() -> None:
    import os
    import signal

    before = signal.getsignal(signal.SIGINT)
    with interruption.Interruption() as stop:
        assert not stop.wait(0)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(3600) and stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


def test_stacks_are_asked_of_outputs_that_have_them() -> None:
    with pytest.raises(BadInput, match="kind stacks"):
        screen.print_reports([screen.Shown("p", {"outputs": [{"kind": "counter"}]})], output="svg")


def test_durations_have_a_unit() -> None:
    assert options.Duration().convert("1m30s", None, None) == 90.0


@pytest.mark.parametrize(("word", "expected"), [("run sysc", "plain,syscount"), ("catalog ru", "plain,runqlat")])
def test_the_shell_completes_probes(word: str, expected: str) -> None:
    words = f"probefleet {word}".split()
    environment = {**os.environ, "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    environment["_PROBEFLEET_COMPLETE"] = "bash_complete"
    program = "import sys; sys.argv[0] = 'probefleet'; from probefleet_cli.main import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert expected in done.stdout.splitlines(), done.stderr


def test_the_shell_completes_namespaces_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    here = local_pods.LocalPods({"u": result.PodName("shop", "web"), "v": result.PodName("other", "x")})
    monkeypatch.setattr(local_pods, "find", lambda: here)
    (option,) = [each for each in main.machine.commands["run"].params if each.name == "namespace"]
    context = click.Context(main.machine.commands["run"])
    assert [each.value for each in option.shell_complete(context, "sh")] == ["shop"]


@pytest.mark.parametrize("module", ["click", "numpy"])
def test_to_be_interrupted_before_it_has_been_loaded_is_no_traceback(module: str) -> None:
    entry = metadata.distribution("probefleet").entry_points.select(group="console_scripts")
    (place,) = {each.value for each in entry if each.name in ("probefleet", "kubectl-probefleet")}
    package, _, function = place.partition(":")
    program = f"from {package} import {function}; {function}()"
    command = [sys.executable, "-X", "importtime", "-c", program, "catalog"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None
        loaded = next(line for line in started.stderr if line.split("|")[-1].strip() == module)
        started.send_signal(signal.SIGINT)
        out, rest = started.communicate(timeout=60)
    assert (started.returncode, out) == (130, ""), loaded
    assert [line for line in rest.splitlines() if not line.startswith("import time:")] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_its_code(shell: str) -> None:
    said = CliRunner().invoke(main.machine, ["completion", shell]).output
    assert "_PROBEFLEET_COMPLETE=" in said and "probefleet" in said


def test_no_help_is_cut_off() -> None:
    for group in (main.machine, main.cluster):
        assert "..." not in CliRunner().invoke(group, ["--help"], terminal_width=80).output.replace("[ARGS]...", "")
