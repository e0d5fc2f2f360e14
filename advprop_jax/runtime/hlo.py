"""Reads a compiled program's text: which collectives it has, how many bytes, and in which loops.

    for collective in collectives(compiled.as_text()):
      print(collective.kind, collective.bytes, collective.depth, collective.times)

The text is that of an XLA program after optimisation, of any platform: `Compiled.as_text()`.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
         "collective-permute", "collective-broadcast")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
# The end of the operands: layouts have closing brackets too, but none before a comma or the end.
_OPERANDS = re.compile(r"^(.*?)\)(?:, (.*))?$")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)"
                     r"=%?([\w.\-]+)|\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([^\]]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a program.

  Attributes:
    name: unique in its computation.
    type: of its result, as it is written: "f32[2,3]{1,0}" or "(f32[2]{0}, s32[])".
    opcode: such as "all-reduce".
    operands: names of instructions of the same computation; of a constant, its value.
    attributes: the rest of the line.
    is_root: whether it is the result of its computation.
  """

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool = False

  @property
  def called(self) -> tuple[str, ...]:
    """Names of the computations that it runs, the condition and the body of a loop among them."""
    if self.opcode.endswith(("-done", "-update")):  # their -start ran it
      return ()
    names = []
    for one, several in _CALLED.findall(self.attributes):
      names += [one] if one else [name.strip().lstrip("%") for name in several.split(",")]
    return tuple(names)


@dataclasses.dataclass(frozen=True)
class Program:
  """A parsed program.

  Attributes:
    computations: {name: {instruction's name: instruction}}.
    entry: name of the computation that a run begins with.
  """

  computations: dict[str, dict[str, Instruction]]
  entry: str


@dataclasses.dataclass(frozen=True)
class Visit:
  """An instruction where a run of the program comes to it.

  Attributes:
    instruction: what is run.
    computation: the instructions beside it, by name.
    depth: how many loops are around it.
    times: how often a run of the program runs it; None if a loop does not say.
  """

  instruction: Instruction
  computation: dict[str, Instruction]
  depth: int
  times: int | None

  @property
  def operand_types(self) -> tuple[str, ...]:
    """Types of the instruction's operands, as they are written."""
    return tuple(self.computation[name].type for name in self.instruction.operands)


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation of a program.

  Attributes:
    kind: one of KINDS; one that is started and awaited apart is one.
    bytes: that each device gives in, each time.
    depth: how many loops are around it; 0 for none.
    times: how often a run of the program runs it; None if a loop does not say.
    group: devices that take part together; None for all.
    source: the traced operation that it is from, such as "jit(step)/while/body/psum"; may be "".
  """

  kind: str
  bytes: int
  depth: int
  times: int | None
  group: int | None
  source: str

  @property
  def in_loop(self) -> bool:
    """Whether it is inside of a loop's body."""
    return self.depth > 0


def collectives(text: str) -> tuple[Collective, ...]:
  """The collectives of a compiled program, in the order in which its text has them.

  Args:
    text: `Compiled.as_text()`.

  Raises:
    ValueError: the text is not that of a program.
  """
  found = []
  for visit in visits(parse(text)):
    instruction = visit.instruction
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
      source = re.search(r'op_name="([^"]*)"', instruction.attributes)
      found.append(Collective(
          kind, sum(map(num_bytes, visit.operand_types)), visit.depth, visit.times,
          _group(instruction.attributes), source.group(1) if source else ""))
  return tuple(found)


def totals(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
  """Number and bytes of collectives by kind, those outside of loops and those in loops apart.

  Returns:
    {kind: {"outside": number, "outside_bytes": of one run, "in_loops": number, "in_loops_bytes": of
    one pass through each loop}}.
  """
  result = {}
  for collective in found:
    row = result.setdefault(collective.kind, dict.fromkeys(
        ("outside", "outside_bytes", "in_loops", "in_loops_bytes"), 0))
    where = "in_loops" if collective.in_loop else "outside"
    row[where] += 1
    row[where + "_bytes"] += collective.bytes
  return result


def parse(text: str) -> Program:
  """The computations and instructions of a program's text.

  Raises:
    ValueError: the text has no ENTRY computation.
  """
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      current = computations.setdefault(header.group(2), {})
      entry = header.group(2) if header.group(1) else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      root, name, type_, opcode, rest = match.groups()
      ends = _OPERANDS.match(rest)
      inside, attributes = ends.groups() if ends else (rest, "")
      operands = (inside,) if opcode == "constant" else tuple(_NAME.findall(inside))
      current[name] = Instruction(name, type_, opcode, operands, attributes or "", bool(root))
  if entry is None:
    raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
  return Program(computations, entry)


def visits(program: Program) -> Iterator[Visit]:
  """Every instruction that a run comes to, once for each place from which it is called."""
  def visit(name, depth, times):
    computation = program.computations[name]
    for instruction in computation.values():
      yield Visit(instruction, computation, depth, times)
      inner = (depth, times)
      if instruction.opcode == "while":
        trips = trip_count(program, instruction)
        inner = (depth + 1, None if None in (times, trips) else times * trips)
      for called in instruction.called:
        if called in program.computations:
          yield from visit(called, *inner)

  yield from visit(program.entry, 0, 1)


def trip_count(program: Program, loop: Instruction) -> int | None:
  """How often a while loop runs its body; None if neither it nor its condition says so.

  XLA notes the number for some platforms. For others it is the constant that the counter of a
  `fori_loop` or `scan`, which starts at 0, is compared with.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if known:
    return int(known.group(1))
  condition = program.computations.get(
      re.search(r"\bcondition=%?([\w.\-]+)", loop.attributes).group(1), {})
  for instruction in condition.values():
    if instruction.is_root and "direction=LT" in instruction.attributes:
      limit = condition.get(instruction.operands[-1])
      if limit is not None and limit.opcode == "constant":
        return int(limit.operands[0])
  return None


def num_bytes(type_: str) -> int:
  """Bytes of all arrays of a type, as its values are counted: without the padding of layouts."""
  return sum(_bits(name) * math.prod(_sizes(sizes)) for name, sizes in _ARRAY.findall(type_)) // 8


def shape(type_: str) -> tuple[int, ...]:
  """The shape of the first array of a type."""
  return _sizes(_ARRAY.search(type_).group(2))


def _sizes(dimensions: str) -> tuple[int, ...]:
  """Of "2,<=3", where the second is the most that a dynamic one may be."""
  return tuple(int(size.lstrip("<=")) for size in dimensions.split(",") if size)


def _bits(name: str) -> int:
  """Of one value: "f32", "bf16", "f8e4m3fn", "pred"."""
  return 8 if name == "pred" else int(re.search(r"\d+", name).group())


def _group(attributes: str) -> int | None:
  """Devices of one of the replica_groups, written {{0,1},{2,3}} or [2,2]<=[4]."""
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
  if listed:
    return len(listed.group(1).split(","))
  dealt = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
  return int(dealt.group(1)) if dealt else None
