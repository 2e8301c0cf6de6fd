"""What became of every part of a model, by comparing its tensors with those it had."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from .report import CHANGES


#: Bytes of a tensor that are brought to the CPU at once.
_CHUNK = 1 << 26


@dataclass
class ModelDigest:
    """What is needed to say later whether a model's tensors are the same bit for bit: a few bytes for each.

    Args:
        tensors: Name -> digest of the tensor's dtype, shape and bytes; parameters and persistent buffers.
        rows: Name of an embedding matrix -> digest of each row; for vocabularies, which grow.
    """

    tensors: dict[str, bytes] = field(default_factory=dict)
    rows: dict[str, list[bytes]] = field(default_factory=dict)


def digest(model: nn.Module) -> ModelDigest:
    """Digest every tensor of a model, to be called before anything is done to it.

    The parts that stay are the same objects in the old and the new model, so that afterwards there would be nothing to
    compare with. SHA-256; 1 to 2 GB/s on one core.
    """
    result = ModelDigest()
    vocabularies = _vocabularies(model)
    for name, tensor in _tensors(model):
        result.tensors[name] = _tensor_digest(tensor)
        if name in vocabularies:
            result.rows[name] = _row_digests(tensor)
    return result


def compare_parts(old: ModelDigest, model: nn.Module, changes: Mapping[str, str] | None = None) -> list[dict]:
    """Every part of a model: kept bit for bit, or what was done to it.

    A tensor is kept if the old model had the same one, by its bytes, under the same name, or one longer or shorter at
    its front within the same part (an old projector may stand inside a new one). Nothing else counts as kept, whatever
    `changes` says. What `changes` says was replaced is not kept, though a new tower of the same family has some equal
    tensors, such as zeros.

    Args:
        old: The old model's digest.
        model: The new model.
        changes: Name of a module or parameter, at any depth -> what was done to what is not kept in it: `"replaced"`,
            `"solved"`, `"trained"`, `"initialised"`; the longest name wins. What is in no such module is `"trained"` if
            the old model had a tensor of this name, dtype and shape, else `"initialised"`.

    Returns:
        `SwapReport.parts`. A part is one entry if all of it had the same fate; the projector is taken apart into its
        modules; of other parts there is one entry for each fate.

    Raises:
        ValueError: an unknown change, or `"kept"`, which is not for the caller to say.
    """
    changes = dict(changes or {})
    wrong = [f"{name}: {what!r}" for name, what in changes.items() if what not in CHANGES or what == "kept"]
    if wrong:
        raise ValueError(f"Not a change: {', '.join(wrong)}. Say one of: {', '.join(set(CHANGES) - {'kept'})}.")
    vocabularies = _vocabularies(model)
    fates: dict[str, dict[str, _Fate]] = {}
    rows: list[dict] = []
    for name, tensor in _tensors(model):
        number = tensor.numel() if isinstance(tensor, nn.Parameter) else 0
        what = _change(name, changes, old)
        if what != "replaced" and _is_kept(name, tensor, old):
            what = "kept"
        elif what != "replaced" and name in vocabularies and name in old.rows:
            entry = _changed_rows(name, tensor, old.rows[name], what)
            if entry is not None:
                rows.append(entry)
                number, what = number - entry["parameters"], "kept"
        fates.setdefault(_part(name), {})[name] = _Fate(what, number)
    entries = []
    for part, tensors in fates.items():
        entries += _entries(part, tensors, model)
    return entries + rows


@dataclass
class _Fate:
    what: str
    parameters: int


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and persistent buffer, tied ones once."""
    saved = model.state_dict(keep_vars=True).keys()
    yield from ((name, tensor) for name, tensor in model.named_parameters() if name in saved)
    yield from ((name, tensor) for name, tensor in model.named_buffers() if name in saved)


def _vocabularies(model: nn.Module) -> set[str]:
    """Names of the matrices with a row for each token."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    found = {id(module.weight) for module in modules if module is not None}
    return {name for name, parameter in model.named_parameters() if id(parameter) in found}


def _tensor_digest(tensor: torch.Tensor) -> bytes:
    sha = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().reshape(-1)
    step = max(_CHUNK // max(flat.element_size(), 1), 1)
    for start in range(0, len(flat), step):
        sha.update(_bytes(flat[start : start + step]))
    return sha.digest()


def _row_digests(matrix: torch.Tensor) -> list[bytes]:
    return [hashlib.blake2b(_bytes(row), digest_size=8).digest() for row in matrix.detach().cpu()]


def _bytes(flat: torch.Tensor) -> memoryview:
    return memoryview(flat.contiguous().cpu().view(torch.uint8).numpy())


def _part(name: str) -> str:
    return name.split(".", 1)[0]


def _is_kept(name: str, tensor: torch.Tensor, old: ModelDigest) -> bool:
    """Whether the old model had these bytes in this place, be it further in or out by some modules."""
    found = _tensor_digest(tensor)
    # Nearly always under its own name; names of models with many experts are too many to compare each with each.
    return old.tensors.get(name) == found or any(
        value == found and _same_place(name, other) for other, value in old.tensors.items()
    )


def _same_place(name: str, other: str) -> bool:
    if name == other:
        return True
    part, _, within = name.partition(".")
    other_part, _, other_within = other.partition(".")
    ends = within.endswith(f".{other_within}") or other_within.endswith(f".{within}")
    return part == other_part and bool(within) and bool(other_within) and ends


def _change(name: str, changes: Mapping[str, str], old: ModelDigest) -> str:
    covering = [prefix for prefix in changes if name == prefix or name.startswith(prefix + ".")]
    if covering:
        return changes[max(covering, key=len)]
    return "trained" if name in old.tensors else "initialised"


def _changed_rows(name: str, matrix: torch.Tensor, old_rows: list[bytes], what: str) -> dict | None:
    """An entry for the rows of a vocabulary that are not the old ones, if most are."""
    rows = _row_digests(matrix)
    changed = [index for index, row in enumerate(rows) if index >= len(old_rows) or row != old_rows[index]]
    if len(changed) > len(rows) // 2:
        return None
    new = [index for index in changed if index >= len(old_rows)]
    note = f"{len(changed)} of {len(rows):,} rows" + (f", {len(new)} of them new" if new else "")
    return {
        "name": f"{name} (rows)",
        "what": "initialised" if len(new) == len(changed) else what,
        "parameters": len(changed) * matrix[0].numel(),
        "note": note if changed else f"{len(old_rows) - len(rows)} rows fewer",
    }


def _entries(prefix: str, tensors: dict[str, _Fate], model: nn.Module) -> list[dict]:
    """Entries of a module, taken apart where its tensors had several fates."""
    fates = {fate.what for fate in tensors.values()}
    if len(fates) == 1:
        return [_entry(prefix, tensors, _class_name(model, prefix))]
    if _part(prefix) != "multi_modal_projector" or prefix in tensors:
        entries = []
        for what in CHANGES:
            chosen = {name: fate for name, fate in tensors.items() if fate.what == what}
            if what != "kept" and 0 < len(chosen) <= 3:
                entries += [_entry(name, {name: fate}, "") for name, fate in chosen.items()]
            elif chosen:
                # A language model has hundreds of modules: they are named in the note, not one by one.
                entries.append(_entry(prefix, chosen, "the rest" if what == "kept" else _named(prefix, chosen)))
        return entries
    children: dict[str, dict[str, _Fate]] = {}
    for name, fate in tensors.items():
        child = name.removeprefix(prefix + ".").split(".", 1)[0]
        children.setdefault(f"{prefix}.{child}", {})[name] = fate
    return [entry for child, own in children.items() for entry in _entries(child, own, model)]


def _entry(name: str, tensors: dict[str, _Fate], note: str) -> dict:
    parameters = sum(fate.parameters for fate in tensors.values())
    return {"name": name, "what": next(iter(tensors.values())).what, "parameters": parameters, "note": note}


def _class_name(model: nn.Module, name: str) -> str:
    try:
        return type(model.get_submodule(name)).__name__
    except AttributeError:  # a parameter
        return ""


def _named(prefix: str, tensors: dict[str, _Fate]) -> str:
    names = [name.removeprefix(prefix + ".") for name in tensors]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
