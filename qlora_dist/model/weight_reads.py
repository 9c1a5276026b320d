"""Linear layers whose weight a model's code reads itself, instead of calling the layer as a module.

Mamba's blocks pass the weight of their output projection to a fused kernel, and some routers multiply with it in fp32.
An adapter wraps the call of a layer, so it has no effect there: PEFT would train and export an adapter that does
nothing. The source code of transformers' classes shows which layers these are. A forward pass would not, because it can
differ between a CPU and a GPU.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from torch import nn

WeightUse = Literal["value", "clamp", "change"]
"""Use of a weight: code computes with it, clamps it in place (repeating this changes nothing), or changes it in place
in another way."""

_METADATA_ATTRIBUTES = {"dtype", "device", "shape", "ndim", "is_meta", "requires_grad", "size", "dim", "element_size"}
"""Attributes that do not depend on a weight's values."""
_NO_FORWARD = {"__init__", "_init_weights", "extra_repr", "reset_parameters", "init_weights"}


@dataclass(frozen=True)
class _WeightRead:
    """Use of a weight in a method of a class."""

    chain: tuple[str, ...]
    """Names before `weight`, such as ("self", "out_proj")."""
    use: WeightUse
    conditions: tuple[tuple[ast.expr, bool], ...]
    """Conditions of the enclosing `if` statements, with the value that each must have to reach the use."""


def find_weight_reads(model: nn.Module) -> dict[str, WeightUse]:
    """Return the modules whose `weight` the model's code reads itself, with its use, by name."""
    uses: dict[str, WeightUse] = {}
    children = [path for path, _ in model.named_modules() if path]
    for path, module in model.named_modules():
        prefix = path and f"{path}."
        for read in _reads_of_class(type(module)):  # type: ignore[arg-type]  # mypy takes no class for hashable
            if any(_evaluate_condition(test, module) is (not expected) for test, expected in read.conditions):
                continue  # the module's settings exclude this branch
            if read.chain[0] == "self":
                names = [prefix + ".".join(read.chain[1:])]
            else:  # a loop variable, whose class is not known: take any module of that name below this one
                end = "." + ".".join(read.chain[1:])
                names = [child for child in children if child.startswith(prefix) and f".{child}".endswith(end)]
            for name in names:
                uses[name] = max(read.use, uses.get(name, "value"), key=get_args(WeightUse).index)
    return uses


@cache
def _reads_of_class(kind: type) -> tuple[_WeightRead, ...]:
    reads: list[_WeightRead] = []
    for base in kind.__mro__:
        definition = _classes(base.__module__).get(base.__name__)
        for method in definition.body if definition is not None else ():
            if isinstance(method, ast.FunctionDef) and method.name not in _NO_FORWARD:
                reads += _reads_of_method(method)
    return tuple(reads)


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """Return the classes that a module of transformers' models defines; none if its code reads no weight."""
    if not module.startswith("transformers.models."):
        return {}
    source = inspect.getsource(sys.modules[module])
    if re.search(r"\w\.\w+\.weight\b", source) is None:
        return {}
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def _reads_of_method(method: ast.FunctionDef) -> Iterator[_WeightRead]:
    parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr == "weight":
            chain, use = _attribute_chain(node.value), _use(node, parents)
            if len(chain) > 1 and use is not None:
                yield _WeightRead(chain, use, tuple(_conditions(node, parents)))


def _attribute_chain(node: ast.expr) -> tuple[str, ...]:
    """Return ("self", "a", "b") for `self.a.b`, and () for an expression that is no chain of names."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute) and (names := _attribute_chain(node.value)):
        return (*names, node.attr)
    return ()


def _use(weight: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> WeightUse | None:
    node: ast.AST = weight
    while isinstance(parent := parents.get(node), ast.Attribute):
        if parent.attr in _METADATA_ATTRIBUTES:
            return None
        if parent.attr.endswith("_") and not parent.attr.startswith("_"):
            return "clamp" if parent.attr == "clamp_" else "change"
        node = parent
    return "value" if isinstance(getattr(node, "ctx", None), ast.Load) else "change"


def _conditions(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[tuple[ast.expr, bool]]:
    while (parent := parents.get(node)) is not None:
        if isinstance(parent, ast.If | ast.IfExp) and node is not parent.test:
            body = parent.body if isinstance(parent.body, list) else [parent.body]
            yield parent.test, node in body
        node = parent


def _evaluate_condition(test: ast.expr, module: nn.Module) -> bool | None:
    """Return the value of a condition on the module's settings; None if it depends on anything else."""
    if isinstance(test, ast.BoolOp):
        values = [_evaluate_condition(part, module) for part in test.values]
        decisive = isinstance(test.op, ast.Or)
        return decisive if decisive in values else None if None in values else not decisive
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    kinds = (ast.Compare, ast.Attribute, ast.Name, ast.Constant, ast.UnaryOp, ast.Not, ast.cmpop, ast.expr_context)
    if names != {"self"} or not all(isinstance(node, kinds) for node in ast.walk(test)):
        return None
    if any(isinstance(node, ast.Attribute) and node.attr == "training" for node in ast.walk(test)):
        return None
    try:
        return bool(eval(compile(ast.Expression(test), "<condition>", "eval"), {"__builtins__": {}}, {"self": module}))
    except AttributeError:
        return None
