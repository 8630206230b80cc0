"""What compiled code says: registers, spills, accesses, and what the loops cost, instructions and bytes of an element by class.

A loop is what lies between a label and the last branch back to it. Those that are in no other one and read or write device memory
walk the tiles; a path that is rarely taken counts in full.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton

# An H100 SXM: multiprocessors, warps for which each issues an instruction in a cycle, clock, bytes a second of a copy.
PROCESSORS, SLOTS, CLOCK, COPY = 132, 4, 1.7e9, 3.0e12
REGISTERS, THREADS = 65536, 2048  # of a multiprocessor
LATENCY = 0.8e-6  # seconds of an access to device memory under load: what is in flight must last so long

CLASSES = {
    "memory": r"LDG|STG|LDS|STS|LDC|ULDC|LDSM|ATOM|RED|LDL|STL",
    "MUFU": r"MUFU",
    "select": r"\w*SEL$|\w*SETP|U?PLOP3|P2R|R2P|VOTE|\w*MNMX",
    "float": r"F(?!2|SEL|SETP|MNMX|LO)\w+$|H(?!MNMX)\w+$|D(?!EP)\w+$",
    "barrier": r"BAR|DEPBAR|WARPSYNC|MEMBAR|SYNCS",
    "integer": r"U?(IMAD|IADD|LEA|LOP3|SHF|IABS|BMSK|SGXT|VIADD|POPC|FLO)|I2|F2|PRMT",
}


MATRIX = {"wgmma": r"[HQ]GMMA", "tcgen05": r"UTC\w*MMA", "mma": r"HMMA", "mfma": r"v_mfma_"}


class Instruction(NamedTuple):
    name: str  # with its modifiers
    target: str | None  # the label of a branch


@dataclass
class Loop:
    """Of one element."""

    classes: dict[str, float]  # instructions
    bytes: float  # of device memory
    read: float  # of these

    @property
    def instructions(self) -> float:
        return sum(self.classes.values())

    @property
    def rates(self) -> tuple[float, float]:
        """Elements a second that an H100 issues, and that its memory moves."""
        return PROCESSORS * SLOTS * 32 * CLOCK / self.instructions, COPY / self.bytes

    @property
    def bound(self) -> str:
        issue, memory = self.rates
        return "memory" if memory < issue else "issue"


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and the number of the one that each label stands before."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*?);", line):
            target = re.search(r"`\((\.L\w+)\)", found[2])
            if found[1] != "NOP":
                code.append(Instruction(found[1], target[1] if target else None))
    return code, labels


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def inspect_cuda(compiled: Any) -> tuple[int, int, list[str], str]:
    """(registers, spilled bytes, names of the instructions, assembly)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
        # Without its analysis of the flow of data, which takes half of its time and adds nothing to the text of these kernels.
        command = [tool("nvdisasm"), "-c", "-ndf", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
    code = [instruction.name for instruction in parse(sass)[0]]
    return int(figures["REG"]), int(figures["STACK"]) + int(figures["LOCAL"]), code, sass


def inspect_hip(compiled: Any) -> tuple[int, int, list[str], str]:
    text = compiled.asm["amdgcn"]
    figures = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text)}
    # Scalars that do not fit are no spill where no memory is used: the compiler parks them in the lanes of a vector register, an
    # instruction for each. It does so with the float64 coefficients that it lifts out of a loop.
    spills = figures["vgpr_spill_count"] + figures["private_segment_fixed_size"]
    return figures["vgpr_count"], spills, re.findall(r"^\t([sv]_\w+|(?:global|buffer|flat|ds)_\w+)", text, re.MULTILINE), text


def accesses(code: list[str], kind: str) -> tuple[int, int]:
    """(16-byte, narrower) global loads and stores."""
    if kind == "cuda":
        memory = [c for c in code if c.startswith(("LDG", "STG"))]
        return sum(".128" in c for c in memory), sum(".128" not in c for c in memory)
    memory = [c for c in code if re.match(r"(global|buffer|flat)_(load|store)", c)]
    return sum("dwordx4" in c for c in memory), sum("dwordx4" not in c for c in memory)


def matrix_instructions(code: list[str]) -> str:
    kinds = [kind for kind, pattern in MATRIX.items() if any(re.match(pattern, c) for c in code)]
    return ", ".join(kinds) or "none"


def width(name: str) -> int:
    """Bytes that a thread reads or writes."""
    bits = re.search(r"\.(?:U|S)?(8|16|64|128)\b", name)
    return int(bits[1]) // 8 if bits else 4


def class_of(name: str) -> str:
    return next((kind for kind, pattern in CLASSES.items() if re.match(pattern, name.split(".")[0])), "other")


def loops_of(text: str, elements: float) -> list[Loop]:
    """Those of a kernel whose threads have so many elements of a tile each, in the order of the code."""
    code, labels = parse(text)
    spans: list[tuple[int, int]] = []
    for end, instruction in enumerate(code):
        start = labels.get(instruction.target or "", end + 1)
        if start < end:
            # Of nested and of overlapping loops, the whole.
            while spans and spans[-1][1] >= start:
                start = min(start, spans.pop()[0])
            spans.append((start, end))
    found = []
    for start, end in spans:
        names = [instruction.name for instruction in code[start : end + 1]]
        read, written = (sum(width(name) for name in names if name.startswith(kind)) for kind in ("LDG", "STG"))
        if read + written:
            counts = {kind: n / elements for kind, n in Counter(map(class_of, names)).items()}
            found.append(Loop(counts, (read + written) / elements, read / elements))
    return found


def in_flight(registers: int, threads: int, read: float) -> float:
    """Bytes that a multiprocessor has under way if every program that fits waits for what it reads, over those that it needs."""
    programs = min(REGISTERS // (-(-registers // 8) * 8 * threads), THREADS // threads)
    return programs * read / (COPY / 2 * LATENCY / PROCESSORS)
