"""One warp in Python that runs the few PTX instructions of ``sum_and_store_assembly``, for tests without a GPU.

Semantics: NVIDIA, Parallel Thread Execution ISA 8.x.
"""

import re

import torch
from torch import Tensor

LANES = torch.arange(32)


class Warp:
    """Registers are tensors (32,), one element a lane; predicates are bool, others int64 or float32."""

    def __init__(self) -> None:
        self.registers: dict[str, Tensor] = {"%laneid": LANES}
        self.memory: dict[int, float] = {}

    def run(self, text: str, operands: list[Tensor]) -> None:
        self.registers |= {f"${i}": x for i, x in enumerate(operands)}
        for line in re.findall(r"[^;]+;", text.strip("{} ")):
            if line.strip() and not line.strip().startswith(".reg"):
                self._step(line.strip(" ;"))

    def _value(self, name: str) -> Tensor:
        if name in self.registers:
            return self.registers[name]
        return torch.full((32,), int(name))

    def _step(self, line: str) -> None:
        predicate = torch.ones(32, dtype=torch.bool)
        if line.startswith("@"):
            guard, line = line.split(maxsplit=1)
            predicate = self.registers[guard[1:]]
        name, rest = line.split(maxsplit=1)
        operation = name.split(".")[0]
        target, *arguments = re.split(r", *", rest)
        if operation == "st":
            for lane in LANES[predicate].tolist():
                at = int(self.registers[target.strip("[]")][lane])
                assert at not in self.memory, "two lanes store in one place"
                self.memory[at] = float(self._value(arguments[0])[lane])
            return
        values = [self._value(x) for x in arguments]
        match operation:
            case "mov":
                result = values[0]
            case "add":
                result = values[0] + values[1]
            case "mul":
                result = values[0] * values[1]
            case "and":
                result = values[0] & values[1]
            case "shr":
                result = values[0] >> values[1]
            case "setp":
                result = values[0] == values[1] if ".eq" in name else values[0] != values[1]
            case "selp":
                result = torch.where(values[2], values[0], values[1])
            case "shfl":
                assert ".bfly" in name
                result = values[0][LANES ^ int(values[1][0])]
            case _:
                raise NotImplementedError(line)
        self.registers[target] = result
