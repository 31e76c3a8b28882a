"""The patch engine: verify every row of a table against the installed host, patch all or nothing, undo LIFO.

Knows no host. A host's table is data: `Patch` rows name what is replaced, `Contract` rows what replacements rely on.
"""

import contextlib
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

from ops_patches import counters, state

logger = logging.getLogger("lora_ops")

MARKER = "__ops_patch__"
UNPATCHED = "unpatched again"
PREFIXES = ("LORA_OPS_", "MOE_OPS_")
"""Of our environment variables."""

_copied: Counter[tuple[str, str]] = Counter()
"""By variable of a host and prefix: how many patches have it listed there, where nobody else had."""


class PatchError(RuntimeError):
    """A patch cannot be applied or undone; the message lists every reason."""


@dataclass(frozen=True)
class Patch:
    """One symbol of the host that is replaced.

    target: "module:attribute.path".
    signature: the parameters it must have, such as "(cls)"; names, kinds and which have a default are compared.
    versions: host versions that this row was written for, as a version specifier.
    replacement: takes the original function and returns the new one. Both take cls or self first.
    why, obsolete_when: what the patch is for, and which change of the host makes it needless.
    platform: only on this platform of the host; empty for any.
    also_bound_in: further "module:attribute.path" bound to the same object, replaced along with it.
    only_when: when the host calls it, if it may well never do so; empty if never firing is a defect.
    """

    target: str
    signature: str
    versions: str
    replacement: Callable[[Callable], Callable]
    why: str
    obsolete_when: str
    platform: str = ""
    also_bound_in: tuple[str, ...] = ()
    only_when: str = ""


@dataclass(frozen=True)
class Contract:
    """Something that the replacements rely on without replacing it.

    signature: compared as in `Patch`; empty for what is not called.
    fields: names that the target must have: fields of a dataclass, or else attributes.
    assigns: instance attributes that the target, a method, must set.
    """

    target: str
    versions: str
    why: str
    signature: str = ""
    fields: tuple[str, ...] = ()
    assigns: tuple[str, ...] = ()
    platform: str = ""


@dataclass(frozen=True)
class Applied:
    """One attribute that was set: what it was, whether the holder itself had it, and what it is now."""

    target: str
    holder: Any
    name: str
    original: Any
    own: bool
    installed: Any


@dataclass(frozen=True)
class Handle:
    """Result of `PatchSet.patch`; as a context manager it undoes the patch, if this call made it.

    applied: whether this call patched. reasons: why it did not; empty when it was patched already.
    """

    patch_set: "PatchSet"
    applied: bool
    reasons: tuple[str, ...] = ()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exc_info) -> None:
        if self.applied:
            self.patch_set.unpatch()


def comma_separated(value: str) -> list[str]:
    """The names in a list such as VLLM_PLUGINS, as vLLM reads it: an empty value lists none."""
    return value.split(",")


@dataclass
class PatchSet:
    """The patches of one host, applied and undone together.

    name: of the host, and of its importable top-level module.
    hosts: tested version range of each distribution that provides the module.
    env: environment variable (0 or 1) that makes child processes patch themselves.
    entry_point: (group, name) under which the host loads our plugin in its processes; the name is also the library's.
    allowlist: the host's environment variable that lists the plugins it loads.
    listed: the names in a value of it, as the host reads it; None: it then loads all.
    copied: the host's environment variable that lists prefixes of those which it sets on other machines, if it has one.
    platform: returns which platform the host runs on.
    before: "module:Class" whose live instances mean that it is too late to patch.
    extras: more that `status` tells.
    key: what status files call it; the host's name unless another set has taken that.
    """

    name: str
    hosts: dict[str, str]
    env: str
    entry_point: tuple[str, str]
    allowlist: str
    platform: Callable[[], str]
    patches: tuple[Patch, ...]
    contracts: tuple[Contract, ...] = ()
    before: tuple[str, ...] = ()
    extras: Callable[[], dict] = dict
    key: str = ""
    listed: Callable[[str], Collection[str] | None] = comma_separated
    copied: str = ""

    def __post_init__(self) -> None:
        self.key = self.key or self.name
        self._library = self.entry_point[1]
        self._applied: list[Applied] = []
        self._reasons: list[str] = [f"not asked for: neither by a call nor by {self.env}=1"]
        self._fired: Counter[str] = Counter()
        self._rows: tuple[Patch, ...] = ()
        self._env_before: str | None = None
        self._prefixes: list[str] = []  # that `copied` lists because of this patch
        self._facts: dict | None = None
        os.register_at_fork(after_in_child=self._fired.clear)

    @property
    def is_patched(self) -> bool:
        """Whether this process is patched."""
        return bool(self._applied)

    def requested(self) -> bool:
        """Whether the environment variable asks for the patch.

        Raises ValueError for a value other than 0 and 1.
        """
        value = os.environ.get(self.env)
        if value not in (None, "0", "1"):
            raise ValueError(f"{self.env}={value!r} is not allowed: set it to 1 (patch {self.name}) or 0 (do not)")
        return value == "1"

    def patch_if_requested(self) -> None:
        """What an entry point does in each of the host's processes: patch if the variable asks for it.

        A host that does not fit is a warning.

        Raises:
            ValueError: the variable is neither 0 nor 1.
        """
        if not self.requested():
            return
        try:
            self.patch()
        except PatchError as exc:
            logger.warning("%s", exc)

    def patch(self, strict: bool = False) -> Handle:
        """Patch the host, all rows or none, and set the environment variable for child processes, on any machine.

        Does nothing when patched already. What does not fit is one warning with every reason, and the host stays as
        it was; with `strict` it raises PatchError instead. Raises PatchError when the host has built what the patch
        must come before, and ValueError for a bad environment variable.
        """
        self.requested()
        if self.is_patched:
            return Handle(self, applied=False)
        _make_visible()
        self._reject_late()
        self._facts = self._probe()  # looked up once: status() is called while serving
        self._reasons = self.verify() or self._apply()
        state.register(self.key, self.status)
        if self._reasons:
            state.publish(force=True)
            message = f"{self._library}: {self.name} is left unpatched:" + "".join(f"\n  - {r}" for r in self._reasons)
            if strict:
                raise PatchError(message)
            logger.warning("%s", message)
            return Handle(self, applied=False, reasons=tuple(self._reasons))
        self._env_before = os.environ.get(self.env)
        os.environ[self.env] = "1"
        self._have_copied()
        logger.info(
            "%s: patched %s %s (%d targets) in pid %d: %s",
            self._library,
            self._facts["host"],
            self._facts["version"],
            len(self._applied),
            os.getpid(),
            ", ".join(applied.target for applied in self._applied),
        )
        for reason in self._facts["unreached_children"]:
            logger.warning(
                "%s: only pid %d is patched, not its worker processes: %s", self._library, os.getpid(), reason
            )
        state.publish(force=True)
        return Handle(self, applied=True)

    def unpatch(self) -> None:
        """Undo the patch in reverse order and restore the environment variable. Does nothing when not patched.

        Raises PatchError, and undoes nothing, when someone has patched over one of our replacements.
        """
        taken = [
            f"{applied.target} is now {_describe(current)}"
            for applied in self._applied
            if (current := vars(applied.holder).get(applied.name)) is not applied.installed
        ]
        if taken:
            raise PatchError(
                f"{self._library}: {self.name} stays patched, for someone patched over it: {'; '.join(taken)}. "
                "Undo that patch first"
            )
        if not self.is_patched:
            return
        self._undo()
        self._reasons = [UNPATCHED]
        if self._env_before is None:
            os.environ.pop(self.env, None)
        else:
            os.environ[self.env] = self._env_before
        if self._env_before == "1":
            logger.warning(
                "%s: %s=1 is of before the patch and stays: %s patches itself again when it next loads its plugins. "
                "For an unpatched engine set it to 0",
                self._library,
                self.env,
                self.name,
            )
        self._no_longer_have_copied()
        logger.info("%s: unpatched %s in pid %d", self._library, self.name, os.getpid())
        state.publish(force=True)

    def verify(self) -> list[str]:
        """Every reason why the host cannot be patched; empty when it can, or is patched already."""
        if self.is_patched:
            return []
        try:
            distribution, version = self.installed()
        except PatchError as exc:
            return [str(exc)]
        tested = self.hosts[distribution]
        if not _within(version, tested):
            return [f"{distribution} {version} is not one of the tested versions ({tested})"]
        try:
            platform = self.platform()
        except Exception as exc:  # the host's own code: whatever it raises is a reason
            return [f"the platform of {self.name} is unknown: {type(exc).__name__}: {exc}"]
        reasons = []
        known = {row.platform for row in self.patches if row.platform}
        if known and platform not in known:
            reasons.append(f"there is no patch for the platform {platform}, only for {', '.join(sorted(known))}")
        rows = self._rows_for(platform, version)
        for row in rows:
            reasons += _misfits(row.target, row.signature) or [
                reason for alias in row.also_bound_in for reason in _alias_misfits(alias, row.target)
            ]
        for row in self.patches:
            if row.platform in ("", platform) and row.target not in {row.target for row in rows}:
                reasons.append(f"{row.target} ({platform}) is for {distribution} {row.versions}, this is {version}")
        for row in self.contracts:
            if row.platform in ("", platform) and _within(version, row.versions):
                reasons += _misfits(row.target, row.signature, row.fields, row.assigns)
        return reasons

    def installed(self) -> tuple[str, str]:
        """(distribution, version) of the host.

        Raises PatchError when it is not installed, or when several distributions share its module.
        """
        found = {}
        for name in self.hosts:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.distribution(name)
        if len(found) > 1:  # the one that is imported, where each lies in a folder of its own
            spec = importlib.util.find_spec(self.name)
            package = Path(spec.origin).parent if spec and spec.origin else None
            found = {name: dist for name, dist in found.items() if Path(dist.locate_file(self.name)) == package}
            if len(found) != 1:
                raise PatchError(f"{' and '.join(self.hosts)} share the folder of {self.name}: uninstall all but one")
        if not found:
            raise PatchError(f"{self.name} is not installed (looked for {', '.join(self.hosts)})")
        ((name, dist),) = found.items()
        return name, dist.version

    def unreached_children(self) -> list[str]:
        """Why processes that the host starts would not be patched; empty when they will be."""
        group, name = self.entry_point
        if not any(point.name == name for point in importlib.metadata.entry_points(group=group)):
            return [f"entry point {name} is not registered in {group}: install this library with pip"]
        allowed = os.environ.get(self.allowlist)
        names = None if allowed is None else self.listed(allowed)
        if names is not None and name not in names:
            return [f"{self.allowlist}={allowed} leaves {name} out: add it"]
        return []

    def status(self) -> dict:
        """What is patched in this process, and what it did since, as plain data.

        "reasons" says why it is not patched, "targets" how often the host called each replacement, "never_fired" which
        ones it never called though it always should, "unreached_children" why its worker processes are not patched.
        What was counted stays to be read after `unpatch`.
        """
        return {
            "pid": os.getpid(),
            **(self._facts or self._probe()),
            "patched": self.is_patched,
            "reasons": list(self._reasons),
            "targets": {row.target: self._fired[row.target] for row in self._rows},
            "never_fired": [row.target for row in self._rows if not row.only_when and not self._fired[row.target]],
            "counters": counters.snapshot(self._library),
            **self.extras(),
            "environment": {name: os.environ.get(name) for name in (self.env, self.allowlist, state.STATUS_DIR)},
        }

    def _have_copied(self) -> None:
        """Have the host set our variables on other machines, too."""
        if self.copied:
            listed = [name for name in os.environ.get(self.copied, "").split(",") if name]
            self._prefixes = [name for name in PREFIXES if name not in listed or _copied[self.copied, name]]
            _copied.update((self.copied, name) for name in self._prefixes)
            os.environ[self.copied] = ",".join(dict.fromkeys(listed + self._prefixes))

    def _no_longer_have_copied(self) -> None:
        """Undo `_have_copied`; what was listed before, or by others, or is still another patch's, stays."""
        if not self._prefixes:
            return
        _copied.subtract((self.copied, name) for name in self._prefixes)
        needless = {name for name in self._prefixes if not _copied[self.copied, name]}
        left = [name for name in os.environ.get(self.copied, "").split(",") if name and name not in needless]
        if left:
            os.environ[self.copied] = ",".join(left)
        else:
            os.environ.pop(self.copied, None)
        self._prefixes = []

    def _rows_for(self, platform: str, version: str) -> tuple[Patch, ...]:
        return tuple(row for row in self.patches if row.platform in ("", platform) and _within(version, row.versions))

    def _probe(self) -> dict:
        try:
            distribution, version = self.installed()
        except PatchError:
            distribution = version = None
        return {"host": distribution, "version": version, "unreached_children": self.unreached_children()}

    def _reject_late(self) -> None:
        classes = []
        for target in self.before:
            module, _, name = target.partition(":")
            if module in sys.modules and hasattr(sys.modules[module], name):
                classes.append(getattr(sys.modules[module], name))
        if not classes:
            return
        frozen = gc.get_freeze_count()
        gc.unfreeze()  # a host may freeze its heap, which hides it from the collector
        gc.collect()  # what was deleted but not collected is not in the way
        live = {type(obj).__qualname__ for obj in gc.get_objects() if issubclass(type(obj), tuple(classes))}
        if live:
            if frozen:
                gc.freeze()
            raise PatchError(
                f"{self._library}: too late to patch, this process has built a {self.name} engine: "
                f"{', '.join(sorted(live))}. "
                f"Patch before the engine is built, or start the process with {self.env}=1"
            )

    def _apply(self) -> list[str]:
        """Set every attribute; on an error undo and return the reason."""
        rows = self._rows_for(self.platform(), self.installed()[1])
        try:
            for row in rows:
                original = _static(*_locate(row.target))
                installed = self._replacement(row, original)
                for target in (row.target, *row.also_bound_in):
                    holder, name = _locate(target)
                    applied = Applied(target, holder, name, original, name in vars(holder), installed)
                    setattr(holder, name, installed)
                    self._applied.append(applied)
        except Exception as exc:  # all or nothing, whatever a holder or a factory raises
            self._undo()
            return [f"{row.target} cannot be replaced: {type(exc).__name__}: {exc}"]
        self._rows = rows
        self._fired.clear()
        return []

    def _replacement(self, row: Patch, original: Any) -> Any:
        """The new function, counting its calls, as a classmethod, staticmethod or property if the original is one."""
        function = _function(original)
        wrapper = None if function is original else type(original)
        replaced = row.replacement(function)

        @functools.wraps(function)
        def counted(*args, **kwargs):
            self._fired[row.target] += 1
            return replaced(*args, **kwargs)

        setattr(counted, MARKER, row.target)
        return wrapper(counted) if wrapper else counted

    def _undo(self) -> None:
        while self._applied:
            applied = self._applied.pop()
            if applied.own:
                setattr(applied.holder, applied.name, applied.original)
            else:
                delattr(applied.holder, applied.name)


def _within(version: str, specifier: str) -> bool:
    """Whether a released version is in the range; builds between releases are none of the tested versions."""
    return SpecifierSet(specifier).contains(version, prereleases=False)


def parameters(signature: str) -> list[tuple[str, Any, bool]]:
    """(name, kind, has a default) of each parameter of "(self, x, *, y=None)"."""
    namespace: dict[str, Any] = {}
    exec(f"def function{signature}: ...", namespace)
    return _parameters(namespace["function"])


def _parameters(function: Callable) -> list[tuple[str, Any, bool]]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default is not p.empty) for p in found]


def _locate(target: str) -> tuple[Any, str]:
    """(object that holds the attribute, attribute name) of "module:attribute.path"."""
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    return functools.reduce(getattr, parents, importlib.import_module(module)), name


def _static(holder: Any, name: str) -> Any:
    """The attribute as it is stored, with its descriptor; what a module makes only when asked is taken from there."""
    return inspect.getattr_static(holder, name, getattr(holder, name))


def _function(value: Any) -> Any:
    """The function behind a classmethod, a staticmethod or a property, else the value itself."""
    if isinstance(value, property):
        return value.fget
    return value.__func__ if isinstance(value, (classmethod, staticmethod)) else value


def _misfits(target: str, signature: str, fields: tuple[str, ...] = (), assigns: tuple[str, ...] = ()) -> list[str]:
    """Every way in which the host's `target` differs from what the table says."""
    try:
        value = _static(*_locate(target))
    except Exception as exc:  # importing runs the host's code: whatever it raises is a reason
        return [f"{target} is not there: {type(exc).__name__}: {exc}"]
    function = _function(value)
    reasons = []
    if signature:
        if hasattr(function, MARKER):
            reasons.append(f"{target} is patched already, by another copy of this library")
        try:
            if _parameters(function) != parameters(signature):
                reasons.append(f"{target} takes {inspect.signature(function)}, expected {signature}")
        except (TypeError, ValueError) as exc:
            reasons.append(f"{target} has no signature: {exc}")
    known = inspect.getattr_static(value, "__dataclass_fields__", None)
    missing = [field for field in fields if (field not in known if known is not None else not hasattr(value, field))]
    if missing:
        reasons.append(f"{target} has no {', '.join(missing)}")
    if assigns:
        unset = set(assigns) - set(inspect.unwrap(function).__code__.co_names)
        if unset:
            reasons.append(f"{target} does not set {', '.join(sorted(unset))}")
    return reasons


def _alias_misfits(alias: str, target: str) -> list[str]:
    try:
        same = _static(*_locate(alias)) is _static(*_locate(target))
    except Exception as exc:
        return [f"{alias} is not there: {type(exc).__name__}: {exc}"]
    return [] if same else [f"{alias} is not {target}"]


def _describe(value: Any) -> str:
    function = _function(value)
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    return f"{module}.{name}" if name else repr(value)


def _make_visible() -> None:
    """Let a person see our INFO and WARNING lines in a process where nothing handles our logger."""
    if logger.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(message)s", datefmt="%m-%d %H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
