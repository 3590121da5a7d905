"""Follows a Dockerfile's instructions into empty folders, without a container engine.

Each stage becomes a folder. The base image becomes an empty folder and a fresh virtual environment, whose `python` is
the image's. A path of the image, in an argument or a variable, becomes the path below the stage's folder. What cannot
be done so (a shell, another program) is refused, and so is every instruction that isn't known.
"""

import io
import json
import os
import re
import shlex
import shutil
import stat
import string
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser  # type: ignore[import-untyped]

STEP_SECONDS = 300
PASSED_ON = re.compile(r"PIP_.*|.*_proxy|.*_PROXY|SSL_CERT_FILE|REQUESTS_CA_BUNDLE")
"""What of the caller's environment decides how packages are downloaded; nothing else of it gets into a build."""


class DockerfileError(ValueError):
    """An instruction cannot be followed."""


# ── Ignore rules ──────────────────────────────────────────────────────────────────────────────────────────────────────


def ignore_rules(text: str) -> list[tuple[re.Pattern[str], bool]]:
    """Return the rules of a .dockerignore: a pattern of whole paths each, and whether it excludes."""
    rules = []
    for line in map(str.strip, text.splitlines()):
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").strip("/")
            if re.search(r"[\[\]\\]", pattern):
                raise DockerfileError(f"cannot read {line!r}")
            parts = re.split(r"(\*\*/?|\*|\?)", pattern)
            signs = {"**": ".*", "**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
            rules.append((re.compile("".join(signs.get(part, re.escape(part)) for part in parts)), line[0] != "!"))
    return rules


def let_in(path: str, rules: list[tuple[re.Pattern[str], bool]]) -> bool:
    """Say whether a file of the context gets into the build: the last rule for it or a folder that it is in decides."""
    names = path.split("/")
    above = ["/".join(names[: count + 1]) for count in range(len(names))]
    included = True
    for pattern, excludes in rules:
        if any(pattern.fullmatch(each) for each in above):
            included = not excludes
    return included


def context_files(context: Path) -> list[str]:
    """Return the files below `context` that the ignore rules let into a build, as paths with slashes."""
    rules = ignore_rules((context / ".dockerignore").read_text(encoding="utf-8"))
    found = []
    for folder, folders, files in os.walk(context):
        folders[:] = [name for name in folders if name != ".git"]
        paths = (Path(folder, name).relative_to(context).as_posix() for name in files)
        found += [path for path in paths if let_in(path, rules)]
    return sorted(found)


# ── Stages ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Image:
    """What the instructions of a stage have made.

    Attributes:
        root: The folder that stands for the image's root.
        bin: Where the base image's `python` is.
        interpreter_env: What that one needs to find its own library.
        workdir: The path within the image that commands run in.
    """

    root: Path
    bin: Path
    interpreter_env: dict[str, str]
    workdir: str = "/"
    env: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    ports: list[int] = field(default_factory=list)
    user: str = ""
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    health_options: dict[str, str] = field(default_factory=dict)

    def outside(self, path: str) -> Path:
        """Return where a path of the image is on this machine."""
        return self.root / os.path.normpath(os.path.join("/", self.workdir, path)).lstrip("/")

    def argv(self, command: list[str]) -> list[str]:
        """Return a command of the image as it can be run here; raises DockerfileError for another program's."""
        if command[:1] != ["python"]:
            raise DockerfileError(f"cannot run {command}")
        rest = [str(self.outside(argument)) if argument.startswith("/") else argument for argument in command[1:]]
        return [str(self.bin / "python"), *rest]

    def environment(self) -> dict[str, str]:
        """Return the image's environment as it is here, and nothing else."""
        own = {name: str(self.outside(value)) if value.startswith("/") else value for name, value in self.env.items()}
        return {"PATH": str(self.bin)} | self.interpreter_env | own

    def protect(self) -> None:
        """Make the tree read-only, and readable for all, as a read-only root file system is."""
        for path in (self.root, *self.root.rglob("*")):
            if not path.is_symlink():
                mode = stat.S_IMODE(path.stat().st_mode)
                readable = 0o555 if path.is_dir() else 0o444
                path.chmod((mode | readable) & ~0o222)

    def contents(self) -> dict[str, int]:
        """Return every file's path and size."""
        files = (path for path in self.root.rglob("*") if path.is_file())
        return {path.relative_to(self.root).as_posix(): path.stat().st_size for path in files}


def open_interpreter(folder: Path) -> tuple[str, dict[str, str]]:
    """Return a Python that every user of this machine may run: this one, or a copy in `folder` if its home is closed.

    A copy works because CPython finds its modules relative to itself; where its core is a shared library, the second
    thing that is returned, an environment, says where.
    """
    prefix = Path(sys.base_prefix)
    if all(path.stat().st_mode & stat.S_IXOTH for path in (prefix, *prefix.parents)):
        return str(prefix / "bin" / "python3"), {}
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    needless = shutil.ignore_patterns("test", "idlelib", "tkinter", "config-*", "site-packages", "__pycache__")
    shutil.copytree(prefix / "lib" / name, folder / "lib" / name, ignore=needless)
    (folder / "bin").mkdir()
    shutil.copy(prefix / "bin" / name, folder / "bin" / name)
    libraries = list((prefix / "lib").glob(f"lib{name}*.so*"))
    for library in libraries:
        shutil.copy(library, folder / "lib")
    return str(folder / "bin" / name), {"LD_LIBRARY_PATH": str(folder / "lib")} if libraries else {}


class Build:
    """Builds stages of a Dockerfile, each only where another or the target needs it."""

    def __init__(self, context: Path, folder: Path, arguments: dict[str, str] | None = None) -> None:
        """Prepare to build from `context`'s Dockerfile into `folder`, with these build arguments."""
        self.context = context
        self.files = context_files(context)
        self.arguments = arguments or {}
        self._folder = folder
        self._built: dict[str, Image] = {}
        self.globals: dict[str, str] = {}
        self.stages: dict[str, tuple[str, list[tuple[str, str]]]] = {}
        self._read(context / "Dockerfile")
        self.bin = folder / "python" / "bin"
        self._interpreter_env: dict[str, str] = {}

    def _make_python(self) -> None:
        """Make the base image's Python: a virtual environment, with nothing but pip in it."""
        interpreter, self._interpreter_env = open_interpreter(self._folder / "interpreter")
        command = [interpreter, "-m", "venv", str(self._folder / "python")]
        environment = {"PATH": os.environ["PATH"]} | self._interpreter_env
        subprocess.run(command, env=environment, check=True, timeout=STEP_SECONDS)  # noqa: S603  # an interpreter

    def _read(self, path: Path) -> None:
        """Sort the instructions by stage: `stages` has the base of each by its name, and its instructions."""
        parser = DockerfileParser(fileobj=io.BytesIO(path.read_bytes()))
        instructions: list[tuple[str, str]] | None = None
        for entry in parser.structure:
            name, value = entry["instruction"], entry["value"]
            if name == "COMMENT":
                continue
            if name == "FROM":
                match = re.fullmatch(r"(\S+)(?:\s+AS\s+(\S+))?", value, re.IGNORECASE)
                if match is None:
                    raise DockerfileError(f"cannot read FROM {value}")
                instructions = []
                self.stages[match[2] or str(len(self.stages))] = (self._expand(match[1], self.globals), instructions)
            elif instructions is not None:
                instructions.append((name, value))
            elif name == "ARG":
                self.globals |= self._argument(value)
            else:
                raise DockerfileError(f"{name} stands before the first FROM")

    def _argument(self, value: str) -> dict[str, str]:
        name, _, default = value.partition("=")
        return {name: self.arguments.get(name, default or self.globals.get(name, ""))}

    @staticmethod
    def _expand(text: str, values: dict[str, str]) -> str:
        """Put the values of arguments and variables into a text; raises KeyError for one that isn't declared."""
        return string.Template(text).substitute(values)

    def stage(self, name: str | None = None) -> Image:
        """Build a stage (None: the last, as a plain ``docker build`` does) and return what it is."""
        name = name or list(self.stages)[-1]
        if name not in self._built:
            base, instructions = self.stages[name]
            root = self._folder / f"stage-{name}"
            if base in self.stages:
                image = self._copy_of(self.stage(base), root)
            else:
                root.mkdir()
                if not self.bin.exists():
                    self._make_python()
                image = Image(root, self.bin, self._interpreter_env)
            values: dict[str, str] = {}
            for instruction, value in instructions:
                self._follow(image, instruction, value, values)
            self._built[name] = image
        return self._built[name]

    @staticmethod
    def _copy_of(base: Image, root: Path) -> Image:
        shutil.copytree(base.root, root)
        return Image(
            root,
            base.bin,
            base.interpreter_env,
            base.workdir,
            dict(base.env),
            dict(base.labels),
            list(base.ports),
            base.user,
        )

    def _follow(self, image: Image, instruction: str, value: str, values: dict[str, str]) -> None:
        """Follow one instruction; `values` are the stage's arguments so far."""
        match instruction:
            case "ARG":
                values |= self._argument(value)
            case "ENV" | "LABEL":
                pairs = [pair.partition("=") for pair in shlex.split(value)]
                into = image.env if instruction == "ENV" else image.labels
                into |= {name: self._expand(text, values | image.env) for name, _, text in pairs}
            case "WORKDIR":
                image.workdir = os.path.normpath(os.path.join(image.workdir, value))
                image.outside(".").mkdir(parents=True, exist_ok=True)
            case "COPY":
                self._copy(image, shlex.split(value))
            case "RUN":
                kept = {name: text for name, text in os.environ.items() if PASSED_ON.fullmatch(name)}
                self._run(image, image.argv(json.loads(value)), kept | image.environment())
            case "USER":
                image.user = value
            case "EXPOSE":
                image.ports += map(int, value.split())
            case "HEALTHCHECK":
                options, _, command = value.partition("CMD ")
                image.health_options = dict(option.removeprefix("--").split("=") for option in options.split())
                image.health = json.loads(command)
            case "CMD":
                image.command = json.loads(value)
            case _:
                raise DockerfileError(f"cannot follow {instruction} {value}")

    def _copy(self, image: Image, words: list[str]) -> None:
        """Copy files of the context or of another stage. Only the ignore rules' files are there to be copied."""
        if words[0].startswith("--from="):
            origin = self.stage(words.pop(0).removeprefix("--from="))
            [source, target] = words
            shutil.copytree(origin.outside(source), image.outside(target), dirs_exist_ok=True)
            return
        *sources, target = words
        into_folder = target.endswith("/") or len(sources) > 1
        for source in sources:
            if source not in self.files:
                raise DockerfileError(f"{source} isn't in the build's context")
            destination = image.outside(target)
            if into_folder:
                destination /= Path(source).name
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.context / source, destination)

    @staticmethod
    def _run(image: Image, command: list[str], environment: dict[str, str]) -> None:
        done = subprocess.run(  # noqa: S603  # what the Dockerfile says
            command,
            cwd=image.outside("."),
            env=environment,
            capture_output=True,
            text=True,
            timeout=STEP_SECONDS,
            check=False,
        )
        if done.returncode:
            raise DockerfileError(f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
