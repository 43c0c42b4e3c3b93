"""A stack machine for pickles that cannot run code.

A pickle is a program for a small stack machine that can import and call any Python function. This
machine has only the instructions that `torch.save` writes for a state dict. Functions are never
resolved: they are records of a name, which a subclass interprets.
"""

import abc
import pickletools
import struct
from dataclasses import dataclass, field

from .._tensors import DAMAGED, CheckpointError
from ._archive import ADVICE


# These bounds on memory and time, about ten times what public checkpoints need, are necessary: an
# instruction of one byte can create a Python object of a hundred bytes.
_MAX_INSTRUCTIONS = 250_000
_MAX_STACK = 10_000
_MAX_DEPTH = 20
_OPCODE_NAMES = {opcode.code: opcode.name for opcode in pickletools.opcodes}


@dataclass(frozen=True, slots=True)
class PickledGlobal:
    """The name of a Python function or class, which is never resolved."""

    name: str


@dataclass(slots=True, eq=False)
class PickledDict:
    """A dict or OrderedDict of the pickle, as pairs, so that nothing from the file is hashed."""

    ordered: bool
    pairs: list[tuple[object, object]] = field(default_factory=list)


@dataclass
class PickleMachine(abc.ABC):
    """A machine that runs a pickle of protocol 2.

    A value is None, a bool, int, float, str, tuple or list, a `PickledDict`, or an object created
    by a subclass. Values may share and even contain one another, and are therefore never traversed
    here.

    - `pickle`: the program.
    - `stack`, `outer`: the values above the last mark, and the stacks below the marks.
    - `memo`: the values stored by the program.
    - `position`: the index of the next instruction.
    """

    pickle: bytes
    stack: list[object] = field(default_factory=list)
    outer: list[list[object]] = field(default_factory=list)
    memo: dict[int, object] = field(default_factory=dict)
    position: int = 0

    @abc.abstractmethod
    def find(self, name: str) -> object:
        """Returns the value of the function or class `name`, or raises `CheckpointError`."""

    @abc.abstractmethod
    def load(self, identifier: object) -> object:
        """Returns the value of a persistent identifier, which in torch is a storage."""

    @abc.abstractmethod
    def call(self, function: object, arguments: object) -> object:
        """Returns the value of a function call."""

    def run(self) -> object:
        """Runs the pickle and returns its value.

        **Raises:** `CheckpointError` for a pickle that `torch.save` would not write.
        """
        if self._take(2) != b"\x80\x02":
            raise CheckpointError(
                "its pickle is not of protocol 2: save it with the default `pickle_protocol`."
            )
        for _ in range(_MAX_INSTRUCTIONS):
            opcode = self._take(1)
            if opcode == b".":
                if self.position != len(self.pickle) or len(self.stack) != 1 or self.outer:
                    raise self.malformed("it stops in the middle")
                return self.stack[0]
            self._execute(opcode)
            if len(self.stack) > _MAX_STACK or len(self.outer) > _MAX_DEPTH:
                raise self.malformed("it is nested too deeply")
        raise self.malformed(f"it takes over {_MAX_INSTRUCTIONS} instructions")

    def _execute(self, opcode: bytes) -> None:
        push = self.stack.append
        match opcode:
            case b"N":  # NONE
                push(None)
            case b"\x88" | b"\x89":  # NEWTRUE, NEWFALSE
                push(opcode == b"\x88")
            case b"K":  # BININT1
                push(self._number(1))
            case b"M":  # BININT2
                push(self._number(2))
            case b"J":  # BININT
                push(int.from_bytes(self._take(4), "little", signed=True))
            case b"\x8a":  # LONG1
                length = self._number(1)
                if length > 8:
                    raise self.malformed("it has an integer of more than 64 bits")
                push(int.from_bytes(self._take(length), "little", signed=True))
            case b"G":  # BINFLOAT
                push(struct.unpack(">d", self._take(8))[0])
            case b"X":  # BINUNICODE
                try:
                    push(self._take(self._number(4)).decode())
                except UnicodeDecodeError:
                    raise self.malformed("it has text that is not UTF-8") from None
            case b"q" | b"r":  # BINPUT, LONG_BINPUT
                self.memo[self._number(1 if opcode == b"q" else 4)] = self._top()
            case b"h" | b"j":  # BINGET, LONG_BINGET
                key = self._number(1 if opcode == b"h" else 4)
                if key not in self.memo:
                    raise self.malformed("it recalls a value that it has not stored")
                push(self.memo[key])
            case b"(":  # MARK
                self.outer.append(self.stack)
                self.stack = []
            case b")":  # EMPTY_TUPLE
                push(())
            case b"\x85" | b"\x86" | b"\x87":  # TUPLE1, TUPLE2, TUPLE3
                items = [self._pop() for _ in range(opcode[0] - 0x84)]
                push(tuple(reversed(items)))
            case b"t":  # TUPLE
                items = self._pop_to_mark()
                self.stack.append(tuple(items))
            case b"]":  # EMPTY_LIST
                push([])
            case b"a" | b"e":  # APPEND, APPENDS
                items = [self._pop()] if opcode == b"a" else self._pop_to_mark()
                target = self._top()
                if not isinstance(target, list):
                    raise self.malformed("it appends to a value that is not a list")
                target.extend(items)
            case b"}":  # EMPTY_DICT
                push(PickledDict(ordered=False))
            case b"s" | b"u":  # SETITEM, SETITEMS
                items = self._pop_to_mark() if opcode == b"u" else [self._pop(), self._pop()][::-1]
                target = self._top()
                if not isinstance(target, PickledDict) or len(items) % 2:
                    raise self.malformed("it sets items of a value that is not a dict")
                target.pairs.extend(zip(items[::2], items[1::2], strict=True))
            case b"c":  # GLOBAL
                push(self.find(self._global_name()))
            case b"Q":  # BINPERSID
                push(self.load(self._pop()))
            case b"R":  # REDUCE
                arguments, function = self._pop(), self._pop()
                push(self.call(function, arguments))
            case b"b":  # BUILD: the attributes of the state dict (`_metadata`), not needed here
                attributes, target = self._pop(), self._top()
                if not (isinstance(target, PickledDict) and target.ordered):
                    raise self.malformed("it sets attributes of a value that is not an OrderedDict")
                if not isinstance(attributes, PickledDict):
                    raise self.malformed("it sets attributes that are not a dict")
            case _:
                known = _OPCODE_NAMES.get(opcode.decode("latin-1"))
                raise CheckpointError(
                    f"its pickle uses the instruction {known or opcode!a}, which a state dict does "
                    f"not need and which is not supported. {ADVICE}"
                )

    def _take(self, length: int) -> bytes:
        taken = self.pickle[self.position : self.position + length]
        if len(taken) != length:
            raise self.malformed("it ends early")
        self.position += length
        return taken

    def _number(self, length: int) -> int:
        return int.from_bytes(self._take(length), "little")

    def _top(self) -> object:
        if not self.stack:
            raise self.malformed("it uses a value of an empty stack")
        return self.stack[-1]

    def _pop(self) -> object:
        top = self._top()
        self.stack.pop()
        return top

    def _pop_to_mark(self) -> list[object]:
        if not self.outer:
            raise self.malformed("it uses a mark that it has not set")
        items, self.stack = self.stack, self.outer.pop()
        return items

    def malformed(self, fault: str) -> CheckpointError:
        """Returns the error for a pickle that torch would not write."""
        return CheckpointError(
            f"its pickle is malformed at byte {self.position}: {fault}. {DAMAGED}"
        )

    def _global_name(self) -> str:
        end = self.pickle.find(b"\n", self.pickle.find(b"\n", self.position) + 1)
        if not self.position < end <= self.position + 500:
            raise self.malformed("it has a global without a name")
        module, name, _ = self._take(end + 1 - self.position).decode("latin-1").split("\n")
        return f"{module}.{name}"
