"""Renders kustomizations, as far as this project's own use them: any field that it does not know is refused.

What kustomize itself makes of them is compared with this where ``kubectl`` is at hand.
"""

import copy
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "labels", "resources", "patches"}


class UnknownFieldError(ValueError):
    """A kustomization says something that this renderer cannot do."""


def load(path: Path) -> Manifest:
    """Read a file that holds one object."""
    objects = list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader))
    if len(objects) != 1 or not isinstance(objects[0], dict):
        raise ValueError(f"{path} holds {len(objects)} objects, not one")
    return objects[0]


class UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses what YAML forbids and PyYAML lets pass: the same key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a dictionary of a mapping; raises ConstructorError for a key that was there before."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = {key for key in keys if keys.count(key) > 1}
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"repeated keys {repeated}", node.start_mark)
        return super().construct_mapping(node, deep)


def render(directory: Path) -> list[Manifest]:
    """Return the objects that ``kubectl apply -k`` would apply.

    Raises:
        UnknownFieldError: The kustomization, or one that it includes, has a field that isn't known here.
    """
    kustomization = load(directory / "kustomization.yaml")
    refuse_others(kustomization, KNOWN)
    objects: list[Manifest] = []
    for resource in kustomization["resources"]:
        path = directory / resource
        objects += render(path) if path.is_dir() else [load(path)]
    objects = copy.deepcopy(objects)
    for patch in kustomization.get("patches", ()):
        apply_patch(patch, objects)
    for manifest in objects:
        if "namespace" in kustomization and manifest["kind"] != "Namespace":
            manifest["metadata"]["namespace"] = kustomization["namespace"]
        for entry in kustomization.get("labels", ()):
            refuse_others(entry, {"pairs"})
            manifest["metadata"].setdefault("labels", {}).update(entry["pairs"])
    names = [identity(manifest) for manifest in objects]
    if len(set(names)) != len(names):
        raise ValueError(f"an object is there twice: {sorted(names)}")
    return objects


def identity(manifest: Manifest) -> tuple[str, str, str]:
    """Return what there can be one of: kind, namespace and name."""
    metadata = manifest["metadata"]
    return manifest["kind"], metadata.get("namespace", ""), metadata["name"]


def one(objects: list[Manifest], kind: str) -> Manifest:
    """Return the only object of a kind."""
    [found] = [manifest for manifest in objects if manifest["kind"] == kind]
    return found


def refuse_others(mapping: dict[str, Any], known: set[str]) -> None:
    """Raise UnknownFieldError if there are keys that aren't known."""
    others = set(mapping) - known
    if others:
        raise UnknownFieldError(f"cannot do {sorted(others)}")


def apply_patch(patch: dict[str, Any], objects: list[Manifest]) -> None:
    """Apply a JSON patch (RFC 6902) that sets or takes away members; raises UnknownFieldError for other operations."""
    refuse_others(patch, {"target", "patch"})
    refuse_others(patch["target"], {"kind", "name"})
    wanted = (patch["target"]["kind"], patch["target"]["name"])
    [manifest] = [each for each in objects if (each["kind"], each["metadata"]["name"]) == wanted]
    for operation in yaml.safe_load(patch["patch"]):
        refuse_others(operation, {"op", "path", "value"})
        *parents, last = operation["path"].strip("/").split("/")
        holder: Any = manifest
        for name in parents:
            holder = holder[int(name) if isinstance(holder, list) else name]
        if not isinstance(holder, dict) or (operation["op"] == "add") == (last in holder):
            raise UnknownFieldError(f"cannot do {operation}")
        if operation["op"] == "remove":
            del holder[last]
        elif operation["op"] in ("add", "replace"):
            holder[last] = operation["value"]
        else:
            raise UnknownFieldError(f"cannot do {operation['op']!r}")
