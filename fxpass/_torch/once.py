"""Set-up that a program does in its first call: functions behind ``functools.lru_cache``.

Written for torch 2.11 to 2.13; active only inside ``dynamo.py``'s patches. Dynamo
traces the function behind the cache, at every compilation and into every call.
A warning told once, or a class patched once, would come again and again, and what is cached
would be another object each time. With arguments that are plain constants the cached function is
called while tracing, as the first call in eager would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._dynamo.source import GlobalSource
from torch._dynamo.variables import base

VariableTracker = base.VariableTracker
_PLAIN = (bool, int, float, str, bytes, type(None))


def once_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """``WrapperUserFunctionVariable.call_function``."""

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        cached = self.wrapper_obj
        given = [*args, *kwargs.values()]
        of_torch = (getattr(cached, "__module__", "") or "").partition(".")[0] == "torch"
        if of_torch or not hasattr(cached, "cache_info") or not all(a.is_python_constant() for a in given):
            return original(self, tx, args, kwargs)
        positional = [a.as_python_constant() for a in args]
        result = cached(*positional, **{k: v.as_python_constant() for k, v in kwargs.items()})
        if isinstance(result, (*_PLAIN, type)):
            return VariableTracker.build(tx, result)
        name = tx.output.install_global_by_id("__fxpass_cached", result)
        return VariableTracker.build(tx, result, GlobalSource(name))

    return call_function
