"""What to run: catalog names and files on the command line in, manifests out, as ``kubectl apply`` would send them.

``run``, ``check`` and ``explain`` call ``read``; the cluster's ``run`` calls ``of_catalog``. A name becomes the
ProbePolicy that a user would have written for it, so that there is one way from here on. Nothing is judged here but
what no manifest at all can be made of; ``preparation`` hands each to the core.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from probefleet_core import catalog as catalog_module
from probefleet_core import errors as core_errors
from probefleet_core import policy, values

from probefleet_cli.failures import BadInput, Failure

Manifest: TypeAlias = dict[str, Any]
MAX_FILE_BYTES = 4 << 20
READABLE = ("ProbePolicy", "ProbeMap")


@dataclass(frozen=True, slots=True)
class Source:
    """One object and where it came from: ``catalog runqlat``, ``slow.yaml (2nd object)``."""

    where: str
    manifest: Manifest

    @property
    def kind(self) -> str:
        """ProbePolicy or ProbeMap."""
        return str(self.manifest.get("kind"))


def load_catalog() -> catalog_module.Catalog:
    """The catalog of this installation; Failure where a release is broken or not built."""
    try:
        return catalog_module.load()
    except catalog_module.CatalogError as error:
        raise Failure(f"the catalog cannot be read: {error}") from error


def read(
    words: Sequence[str],
    *,
    catalog: catalog_module.Catalog,
    settings: Mapping[str, str],
    interval: str | None,
    by: Sequence[str] = (),
    default_interval: str = "1s",
    scope: str = "Cluster",
    stdin: Iterable[str] | None = None,
) -> list[Source]:
    """Every object that the words name.

    ``settings`` and ``by`` go to every catalog program, ``interval`` to every policy. ``scope`` is what a catalog name
    gets; files say it themselves.
    """
    found: list[Source] = []
    for word in words:
        if looks_like_file(word):
            found += _from_file(word, stdin)
        else:
            found.append(Source(f"catalog {word}", of_catalog(word, catalog, scope=scope, interval=default_interval)))
    for source in found:
        if source.kind == "ProbePolicy":
            _override(source.manifest, settings, interval)
    probes = [source.manifest for source in found if _catalog_program(source.manifest) is not None]
    if settings and not probes:
        raise BadInput(
            "--set gives parameters of catalog probes, and there is none here: write its name, as in syscount"
        )
    if by and not probes:
        raise BadInput("--by groups what catalog probes count, and there is none here: write groupBy into the outputs")
    for manifest in probes:
        group(manifest, catalog, by)
    return _named_once(found)


def looks_like_file(word: str) -> bool:
    """A path, ``-`` or something with a manifest's ending; anything else is the name of a probe."""
    return word == "-" or "/" in word or word.endswith((".yaml", ".yml", ".json")) or Path(word).is_file()


def of_catalog(
    name: str, catalog: catalog_module.Catalog, *, scope: str, interval: str, namespace: str | None = None
) -> Manifest:
    """The policy that runs a probe with its defaults; BadInput with near names for one that there is not."""
    if catalog.get(name) is None:
        near = core_errors.did_you_mean(name, catalog.names, what="probe in the catalog")
        raise BadInput(f"no probe {name!r} in the catalog, and no file of that name. {near}")
    return {
        "apiVersion": policy.API_VERSION,
        "kind": "ProbePolicy",
        "metadata": {"name": name, **({"namespace": namespace} if namespace else {})},
        "spec": {"scope": scope, "program": {"catalog": {"name": name}}, "interval": interval},
    }


def group(manifest: Manifest, catalog: catalog_module.Catalog, by: Sequence[str]) -> None:
    """``--by``: write a catalog policy's outputs into it, told apart by these fields in place of the probe's own pod,
    workload or node; fields of the key stay. An output that cannot be, and one that is in the manifest, stays as it is.
    """
    program = _catalog_program(manifest)
    probe = catalog.get(str(program.get("name"))) if program else None
    if not by or probe is None or manifest["spec"].get("outputs"):
        return
    if not any(_fits(each, by) for each in probe.outputs):
        possible = (f"{each.output.name}: node, {', '.join(each.allowed_group_by)}" for each in _countable(probe))
        raise BadInput(
            f"--by {','.join(by)}: no output of {probe.name} can be told apart by {' and '.join(by)}. "
            f"They can be by: {'; '.join(possible) or 'nothing, for it has events alone'}"
        )
    manifest["spec"]["outputs"] = [_grouped(each, by) for each in probe.outputs]
    if fill := {each.name: "true" for each in probe.parameters if each.fills in by}:
        assert program is not None
        program["parameters"] = {**fill, **(program.get("parameters") or {})}


def parse_fields(text: str | None) -> tuple[str, ...]:
    """``--by pod,key.process``."""
    fields = tuple(dict.fromkeys(field.strip() for field in (text or "").split(",")))
    if text is not None and not all(fields):
        raise BadInput(f"--by {text}: a field is missing there. Write for example --by pod")
    return fields if text is not None else ()


def _countable(probe: catalog_module.Probe) -> list[catalog_module.Output]:
    return [each for each in probe.outputs if each.output.kind is not values.Kind.EVENTS]


def _fits(each: catalog_module.Output, by: Sequence[str]) -> bool:
    return each.output.kind is not values.Kind.EVENTS and set(by) <= {"node", *each.allowed_group_by}


def _grouped(each: catalog_module.Output, by: Sequence[str]) -> Manifest:
    """An output as a manifest has it."""
    output = each.output
    fields = tuple(output.group_by or ())
    if _fits(each, by):
        fields = tuple(dict.fromkeys((*by, *(field for field in fields if field.startswith("key")))))
    kind: Manifest = {}
    if output.kind is values.Kind.GAUGE:
        kind["merge"] = output.merge.value
    elif output.histogram is not None:
        kind = {"scale": output.histogram.scale.value}
        kind |= {name: found for name in ("step", "slots") if (found := getattr(output.histogram, name))}
    source = {"map": output.map, **({"value": output.value} if output.value else {})}
    manifest: Manifest = {"name": output.name, "from": source, output.kind.value: kind, "limit": output.limit}
    if output.unit:
        manifest["unit"] = output.unit
    return manifest if output.kind is values.Kind.EVENTS else {**manifest, "groupBy": list(fields)}


def parse_settings(texts: Sequence[str]) -> dict[str, str]:
    """``--set parameter=value``, each; the last of a name wins."""
    settings: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise BadInput(
                f"--set {text}: there is no parameter=value in it. Write for example --set syscalls=openat,read"
            )
        settings[name.strip()] = value
    return settings


def _from_file(word: str, stdin: Iterable[str] | None) -> Iterator[Source]:
    shown = "standard input" if word == "-" else word
    try:
        if word == "-":
            text = "".join(stdin if stdin is not None else sys.stdin)
        else:
            path = Path(word)
            if path.stat().st_size > MAX_FILE_BYTES:
                raise BadInput(
                    f"{word}: it has more than {MAX_FILE_BYTES >> 20} MiB; a policy has at most 96 KiB of source"
                )
            text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(
            f"{shown}: cannot be read: {error.strerror}. Write the path of a file, or a name: probefleet catalog"
        ) from error
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{shown}: this is not text in UTF-8 (byte {error.start}). Write a ProbePolicy in YAML"
        ) from error
    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        raise BadInput(f"{shown}: this is not YAML: {error}") from error
    if not documents:
        raise BadInput(f"{shown}: there is no object in it. Write a ProbePolicy; probefleet catalog NAME shows one")
    for index, document in enumerate(_flat(documents), start=1):
        where = shown if len(documents) == 1 and index == 1 else f"{shown}, object {index}"
        if not isinstance(document, dict) or "kind" not in document:
            raise BadInput(
                f"{where}: this is no object of Kubernetes, for it has no kind. Write a ProbePolicy; "
                "probefleet catalog NAME shows one"
            )
        if document["kind"] not in READABLE:
            kind = document["kind"]
            raise BadInput(f"{where}: kind {kind!r}: only {' and '.join(READABLE)} can be run here. Take it out")
        yield Source(where, document)


def _flat(documents: Iterable[object]) -> Iterator[object]:
    """Objects, and those within a List, as ``kubectl get -o yaml`` writes several."""
    for document in documents:
        if isinstance(document, dict) and document.get("kind") == "List" and isinstance(document.get("items"), list):
            yield from document["items"]
        else:
            yield document


def _override(manifest: Manifest, settings: Mapping[str, str], interval: str | None) -> None:
    """Put what the command line says into a manifest; one too broken for that is left for ``policy`` to refuse."""
    spec = manifest.get("spec")
    if not isinstance(spec, dict):
        return
    if interval:
        spec["interval"] = interval
    program = _catalog_program(manifest)
    if program is not None and settings:
        parameters = program.get("parameters") or {}
        program["parameters"] = {**parameters, **settings} if isinstance(parameters, dict) else parameters


def _catalog_program(manifest: Manifest) -> dict[str, Any] | None:
    spec = manifest.get("spec")
    program = spec.get("program") if isinstance(spec, dict) else None
    named = program.get("catalog") if isinstance(program, dict) else None
    return named if isinstance(named, dict) else None


def _named_once(sources: list[Source]) -> list[Source]:
    seen: dict[tuple[str, str, str], str] = {}
    for source in sources:
        metadata = source.manifest.get("metadata")
        if not isinstance(metadata, dict):
            continue
        key = (source.kind, str(metadata.get("namespace") or ""), str(metadata.get("name")))
        if key in seen:
            raise BadInput(
                f"{source.where}: {key[0]} {key[2]!r} is in {seen[key]} as well. Give one of them another name"
            )
        seen[key] = source.where
    return sources
