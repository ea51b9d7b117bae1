"""What a compiled program does behind one's back: copies of large arrays, host transfers, temporaries.

    program = rollout.step.lower(generator, params, state).compile()
    print(audit(program, large=state.cache.key.size))

It reads the text of the optimised program, so it works for any device XLA compiles for, also one that is
not there (ahead-of-time compilation).
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}

# What makes a new array out of another one without computing anything.
_COPIES = {
    *("copy", "copy-start", "transpose", "reshape", "convert", "concatenate", "pad", "reverse", "broadcast"),
    *("gather", "slice", "dynamic-slice", "select"),
}
# What gives a name to memory that is there already, or writes into it in place.
_IN_PLACE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("scatter", "dynamic-update-slice", "copy-done", "optimization-barrier", "opt-barrier", "partition-id"),
}
_COLLECTIVES = {"all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute"}
_TRANSFERS = {"infeed", "outfeed", "send", "recv", "send-done", "recv-done"}
_HOST_CALL = re.compile(r'custom_call_target="[^"]*(?:callback|host)[^"]*"', re.IGNORECASE)
_HOST_MEMORY = re.compile(r"\{[^}]*S\(5\)")

_INSTRUCTION = re.compile(
    r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.-]+) = "
    r"(?P<type>\(.*?\)|\w+\[[\d,]*\](?:\{[^}]*\})?) (?P<op>[\w-]+)\("
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_SOURCE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      op: what it does; for a fusion, what its last instruction does.
      shape: the array it makes, such as `bf16[30,1,9,1560,12,128]`.
      elements: how many there are.
      size: bytes.
      source: where in the model it comes from, as far as the compiler remembers.
    """

    op: str
    shape: str
    elements: int
    size: int
    source: str


@dataclasses.dataclass(frozen=True)
class Audit:
    """The findings.

    Attributes:
      copies: instructions that make a large array out of another one without computing anything.
      host_transfers: instructions that talk to the host.
      collectives: instructions that exchange arrays between devices.
      temporary_bytes: memory the program needs beside its arguments and results.
      temporaries: the arrays that computations make, largest first, one for each shape and operation.
    """

    copies: tuple[Instruction, ...]
    host_transfers: tuple[Instruction, ...]
    collectives: tuple[Instruction, ...]
    temporary_bytes: int
    temporaries: tuple[Instruction, ...]

    def __str__(self) -> str:
        lines = [
            f"copies of large arrays: {len(self.copies)}",
            *(f"  {x.op} {x.shape} {x.source}" for x in self.copies),
            f"host transfers: {len(self.host_transfers)}",
            *(f"  {x.op} {x.source}" for x in self.host_transfers),
            f"exchanges between devices: {len(self.collectives)}",
            *(f"  {x.op} {x.shape} {x.source}" for x in self.collectives),
            f"temporary memory: {self.temporary_bytes / 2**20:.1f} MiB",
            "largest temporaries:",
            *(f"  {x.size / 2**20:8.1f} MiB  {x.op:20} {x.shape}  {x.source}" for x in self.temporaries),
        ]
        return "\n".join(lines)


def audit(compiled: Any, *, large: int, count: int = 10) -> Audit:
    """Reads a compiled program.

    Args:
      compiled: result of `jax.jit(f).lower(...).compile()`.
      large: from how many elements on an array counts as large; for a block step the size of the cached keys.
      count: how many temporaries to list.
    """
    found = list(_instructions(compiled.as_text()))
    analysis = compiled.memory_analysis()
    made = [x for x, _ in found if x.op not in _IN_PLACE and x.elements]
    kinds = collections.OrderedDict(((x.op, x.shape), x) for x in sorted(made, key=lambda x: x.size))
    return Audit(
        copies=tuple(x for x, _ in found if x.op in _COPIES and x.elements >= large),
        host_transfers=tuple(x for x, line in found if _is_transfer(x, line)),
        collectives=tuple(x for x, _ in found if x.op.removesuffix("-start") in _COLLECTIVES),
        temporary_bytes=analysis.temp_size_in_bytes,
        temporaries=tuple(reversed(kinds.values()))[:count],
    )


def _is_transfer(instruction: Instruction, line: str) -> bool:
    return (
        instruction.op in _TRANSFERS
        or _HOST_CALL.search(line) is not None
        or _HOST_MEMORY.search(line.split("metadata=")[0]) is not None
    )


def _instructions(text: str) -> Iterator[tuple[Instruction, str]]:
    """The instructions outside of fusions, each with its line."""
    computations = _computations(text)
    roots = {name: _root(lines) for name, lines in computations.items()}
    inside = {m for lines in computations.values() for line in lines for m in _inner(line)}
    for name, lines in computations.items():
        if name not in inside:
            for line in lines:
                match = _INSTRUCTION.match(line)
                if match:
                    yield _read(match, line, roots), line


def _inner(line: str) -> list[str]:
    """Names of the computations whose values never reach memory."""
    match = _INSTRUCTION.match(line)
    is_called = match is not None and match["op"] in ("call", "while", "conditional")
    return [] if is_called else _CALLS.findall(line)


def _computations(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        header = None if line.startswith(" ") else _COMPUTATION.match(line)
        if header:
            current = found.setdefault(header[1], [])
        elif line.startswith(" "):
            current.append(line)
    return found


def _root(lines: list[str]) -> str:
    """The operation that makes a fusion's result, behind the changes of shape that cost nothing."""
    by_name = {m["name"]: (m["op"], line) for line in lines if (m := _INSTRUCTION.match(line))}
    last = next((m for line in lines if (m := _INSTRUCTION.match(line)) and m["root"]), None)
    op, line = (last["op"], last.string) if last else ("", "")
    while op == "bitcast":
        operand = re.search(r"bitcast\(%?([\w.-]+)", line)
        if operand is None or operand[1] not in by_name:
            break
        op, line = by_name[operand[1]]
    return op


def _read(match: re.Match[str], line: str, roots: Mapping[str, str]) -> Instruction:
    op, called = match["op"], _CALLS.search(line)
    if op == "fusion" and called:
        root = roots.get(called[1], "")
        op = root if root in _COPIES | _IN_PLACE else "fusion"
    sizes = [(kind, _elements(dimensions)) for kind, dimensions in _ARRAY.findall(match["type"])]
    elements = max((n for _, n in sizes), default=0)
    size = sum(n * _BITS.get(kind, 8) // 8 for kind, n in sizes)
    source = _SOURCE.search(line)
    return Instruction(
        op, re.sub(r"\{[^}]*\}", "", match["type"]), elements, size, source[1] if source else ""
    )


def _elements(dimensions: str) -> int:
    return math.prod(int(n) for n in dimensions.split(",")) if dimensions else 1
