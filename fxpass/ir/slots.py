"""What an optimizer holds, by one name from capture to runtime: parameters, their state, settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch.optim import Optimizer

_T = TypeVar("_T")


@dataclass(frozen=True)
class Slot:
    """Where an optimizer keeps one value that its ``step()`` reads or replaces.

    - a parameter: ``param_groups[group]["params"][position]``;
    - its state: ``state[that parameter][key]``;
    - a setting, or a number that a group counts: ``param_groups[group][key]``, without a position;
    - an attribute: ``self.key``, without a group.

    ``item`` is the element, where the value is a tuple (``betas``). Slots are
    made while a step is captured; two are equal if they are the same place.
    """

    optimizer: int  # its number among the optimizers of the frame
    group: int | None
    position: int | None = None
    key: str | None = None
    item: int | None = None
    name: str = field(default="", compare=False)  # of the parameter, qualified, as the user knows it

    @property
    def owner(self) -> Slot:
        """The parameter whose state this is; a slot that is no state is its own."""
        return self if self.position is None or self.key is None else replace(self, key=None)

    def state(self, key: str) -> Slot:
        """The slot of this parameter's state ``key``."""
        return replace(self, key=key)

    def of_group(self, groups: Sequence[_T]) -> _T:
        """What ``groups``, one for each param group, has for the slot's."""
        assert self.group is not None, f"{self} is an attribute"
        return groups[self.group]

    def read(self, optimizer: Optimizer) -> Any:
        """The present value, looked up anew; None if there is none."""
        holder: Any = vars(optimizer) if self.group is None else optimizer.param_groups[self.group]
        if self.position is not None:
            parameter = holder["params"][self.position]
            return parameter if self.key is None else optimizer.state.get(parameter, {}).get(self.key)
        value = holder.get(self.key)
        return value[self.item] if self.item is not None and isinstance(value, (tuple, list)) else value

    def write(self, optimizer: Optimizer, value: Any) -> None:
        """Put ``value`` there: in the parameter's state, in the group, or in the attribute."""
        assert self.key is not None, "a parameter is written in place"
        if self.item is not None:
            items = list(replace(self, item=None).read(optimizer))
            items[self.item] = value
            value = tuple(items)
        if self.group is None:
            setattr(optimizer, self.key, value)
        elif self.position is None:
            optimizer.param_groups[self.group][self.key] = value
        else:
            optimizer.state[self.owner.read(optimizer)][self.key] = value

    def present(self, optimizer: Optimizer) -> bool:
        """Whether the group or the object has an entry of this name."""
        holder = vars(optimizer) if self.group is None else optimizer.param_groups[self.group]
        return self.key in holder

    def remove(self, optimizer: Optimizer) -> None:
        """Take the entry out of the group or the object."""
        holder: Any = vars(optimizer) if self.group is None else optimizer.param_groups[self.group]
        holder.pop(self.key, None)

    @property
    def path(self) -> str:
        """The Python expression for it, for messages: ``param_groups[0]['betas'][1]``."""
        return self._text("self.{key}", "param_groups[{group}][{key!r}]", "state[{name}][{key!r}]")

    def __str__(self) -> str:
        """What lists of inputs call it: ``layer.weight``, ``exp_avg[layer.weight]``, ``lr[0]``."""
        return self._text("{key}", "{key}[{group}]", "{key}[{name}]")

    def _text(self, attribute: str, setting: str, state: str) -> str:
        if self.position is not None:
            return self.name if self.key is None else state.format_map(vars(self))
        item = "" if self.item is None else f"[{self.item}]"
        return (attribute if self.group is None else setting).format_map(vars(self)) + item
