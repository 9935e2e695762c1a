"""Types of a model's methods for type checkers, derived from the methods' own signatures: nothing is written twice.

A call returns a tuple where it is told `return_dict=False`, `from_pretrained` a pair where it is told to say what it
did, `generate` a whole `GenerateOutput` where it is told `return_dict_in_generate=True`; else each returns one thing,
whose type these keep. Where it is the config that asks for the other, a checker cannot know: say it in the call. When
the program runs, the decorators do nothing.

`model(**prompt)`, with a mapping of anything, would fit each of several signatures. So those that return something else
want their first argument by place, and the method's own signature has the argument that decides at its default alone
(`ReturnDict`, `Off`, `On`), or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeAlias, TypeVar, overload

__all__ = ["Off", "On", "ReturnDict", "same_as", "typed_call", "typed_load"]

P = ParamSpec("P")
T = TypeVar("T")
Model = TypeVar("Model")
Output = TypeVar("Output")
Returned = TypeVar("Returned", covariant=True)

if TYPE_CHECKING:
    ReturnDict: TypeAlias = None
    Off: TypeAlias = Literal[False]
    On: TypeAlias = Literal[True]
else:
    ReturnDict, Off, On = bool | None, bool, bool


class Call(Protocol[P, Returned]):
    """A model's call."""

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Returned: ...
    @overload
    def __call__(self, ids: Any, /, *args: Any, return_dict: Literal[False], **kwargs: Any) -> tuple[Any, ...]: ...
    @overload
    def __call__(self, ids: Any, /, *args: Any, return_dict: Literal[True], **kwargs: Any) -> Returned: ...


class Load(Protocol[P, Returned]):
    """`from_pretrained` of one class. `_do_init=False`, which gives the parameters beside the model, is Flax's."""

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Returned: ...
    @overload
    def __call__(
        self, path: Any, /, *, output_loading_info: Literal[True], _do_init: Literal[False], **kwargs: Any
    ) -> tuple[Returned, Any, dict[str, list[Any]]]: ...
    @overload
    def __call__(
        self, path: Any, /, *, output_loading_info: Literal[True], **kwargs: Any
    ) -> tuple[Returned, dict[str, list[Any]]]: ...
    @overload
    def __call__(self, path: Any, /, *, _do_init: Literal[False], **kwargs: Any) -> tuple[Returned, Any]: ...


if TYPE_CHECKING:

    def same_as(method: T) -> Callable[[Callable[..., Any]], T]:
        """A method that has the type of `method`."""

    def typed_call(method: Callable[Concatenate[Any, P], Output | tuple[Any, ...]]) -> Call[P, Output]:
        """A method that calls the model."""

    class typed_load(Generic[P]):
        """The class method that loads a model."""

        def __init__(self, function: Callable[Concatenate[Any, P], Any], /) -> None: ...
        def __get__(self, instance: object, owner: type[Model]) -> Load[P, Model]: ...

else:

    def typed_call(method):
        """The method."""
        return method

    def same_as(method):
        """A decorator that returns the method unchanged; the type is for checkers alone."""
        return typed_call

    typed_load = classmethod
