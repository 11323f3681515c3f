"""The search of `model_configurator`: from each first point uphill, or over a whole grid.

The vendor's optimizer is not public. Here a parameter moves by one or by a factor of two, the best
neighbour is taken, and a search ends where no neighbour is better by more than `GAIN`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Sequence, Tuple

from ..documents import Refusal, parse_json, read_text, shown

NAMES = ("cores", "mos", "ols", "batchSize", "instances", "setSize")
"""Parameters in the order of a point, as the vendor's log calls them."""

GAIN = 0.02
"""A part by which a cost has to fall: measured figures differ by less from run to run."""

SUCCESS = "SUCCESS"
NOT_CONVERGED = "NOT_CONVERGED"

DEFAULT_MOST = 200
_KEYS = {
    "cores": 0, "mos": 1, "ols": 2, "batch-size": 3, "batch_size": 3, "bs": 3, "instances": 4,
    "set-size": 5, "set_size": 5,
}  # fmt: skip
_MINIMIZE_LATENCY = {
    "max-throughput": False,
    "maximize_inf_rate": False,
    "min-latency": True,
    "minimize_latency": True,
}
_MAX_SIZE = 1024
Point = Tuple[int, ...]
Costs = Dict[Point, float]


class ConfigurationError(Refusal):
    """The command line or the configuration file is refused; the message is for stderr."""


class Space(NamedTuple):
    """The least and the most of each parameter of `NAMES`, and the cores of the device."""

    bounds: Tuple[Tuple[int, int], ...]
    num_cores: int

    def holds(self, point: Point) -> bool:
        """Whether a point may be measured."""
        within = all(low <= x <= high for x, (low, high) in zip(point, self.bounds))
        return within and point[0] * point[4] <= self.num_cores

    def neighbours(self, point: Point) -> List[Point]:
        """Points that differ in one parameter, by one or by a factor of two."""
        found: Dict[Point, None] = {}
        for index, value in enumerate(point):
            for other in (value // 2, value - 1, value + 1, value * 2):
                near = (*point[:index], other, *point[index + 1 :])
                if near != point and self.holds(near):
                    found[near] = None
        return list(found)

    def grid(self, values: Sequence[Sequence[int]]) -> List[Point]:
        """All points of these values of each parameter that may be measured."""
        return [point for point in itertools.product(*values) if self.holds(point)]


class Found(NamedTuple):
    """Where a search from `start` ended."""

    start: Point
    best: Point
    cost: float
    status: str


def climb(
    starts: Sequence[Point],
    space: Space,
    evaluate: Callable[[List[Point]], Mapping[Point, float]],
    most: int,
) -> List[Found]:
    """Search from every start at once; a point that several come to is evaluated once.

    Args:
        starts: points of the space.
        space: where to search.
        evaluate: the cost of each of these points, infinite where one cannot be had.
        most: how many points one start may look at.
    """
    costs: Costs = {}
    here, seen = list(starts), [{start} for start in starts]
    statuses = [""] * len(here)
    while not all(statuses):
        around = {}
        for index, point in enumerate(here):
            if not statuses[index]:
                near = space.neighbours(point)
                seen[index].update(near)
                around[index] = near
        wanted = {here[i]: None for i in around}
        wanted.update((point, None) for near in around.values() for point in near)
        fresh = [point for point in wanted if point not in costs]
        if fresh:
            costs.update(evaluate(fresh))
        for index, near in around.items():
            best = min(near, key=costs.__getitem__, default=here[index])
            if not is_better(costs[best], costs[here[index]]):
                statuses[index] = SUCCESS
            elif len(seen[index]) >= most:
                here[index], statuses[index] = best, NOT_CONVERGED
            else:
                here[index] = best
    return [Found(s, p, costs[p], status) for s, p, status in zip(starts, here, statuses)]


def is_better(cost: float, than: float) -> bool:
    """Whether a cost is lower by more than chance."""
    if math.isinf(than):
        return cost < than
    return cost < than - abs(than) * GAIN


def read_search(file: str, set_size: int) -> Tuple[List[Tuple[int, int]], List[Point], bool, int]:
    """Bounds, first points, whether latency is minimized, and evaluations of each first point.

    Args:
        file: the JSON, in the form of either tutorial.
        set_size: where the file has none.

    Raises:
        ConfigurationError: where it is refused.
    """
    document = parse_json(read_text(file, ConfigurationError), file, ConfigurationError)
    if not isinstance(document, dict):
        raise ConfigurationError(f"{file} must be a JSON object")
    mode = document.get("search-mode", "optimized")
    objective = document.get("objective")
    if mode != "optimized" or objective not in list(_MINIMIZE_LATENCY):
        raise ConfigurationError(
            f"{file}: search-mode must be optimized, and objective one of "
            f"{', '.join(_MINIMIZE_LATENCY)}"
        )
    bounds = [(1, 1)] * 5 + [(set_size, set_size)]
    for name, value in _of_names(document, file, "search-parameters", "params").items():
        range_: Mapping[str, Any] = value if isinstance(value, dict) else {}
        low, high = range_.get("min", 0), range_.get("max", 0)
        if not (_is_size(low) and _is_size(high) and low <= high):
            raise ConfigurationError(f"{file}: {name} needs min and max from 1 to {_MAX_SIZE}")
        bounds[_KEYS[name]] = (low, high)
    for name, value in _of_names(document, file, "static-params", "static_params").items():
        if not _is_size(value):
            raise ConfigurationError(f"{file}: {name} must be from 1 to {_MAX_SIZE}")
        bounds[_KEYS[name]] = (value, value)
    firsts = document.get("initial-values", document.get("initial_values"))
    if not isinstance(firsts, list) or not firsts:
        raise ConfigurationError(f"{file} needs a list of initial values")
    starts = []
    for first in firsts:
        point = [low for low, _ in bounds]
        for name, value in _of_names({"it": first}, file, "it", "it").items():
            if not _is_size(value):
                raise ConfigurationError(f"{file}: {name} must be from 1 to {_MAX_SIZE}")
            point[_KEYS[name]] = value
        starts.append(tuple(point))
    most = document.get("max_func_eval", DEFAULT_MOST)
    if not isinstance(most, int) or most < 1:
        raise ConfigurationError(f"{file}: max_func_eval is {shown(most)}, not a positive number")
    return bounds, starts, _MINIMIZE_LATENCY[objective], most


def _of_names(document: Mapping[str, Any], file: str, *names: str) -> Dict[str, Any]:
    """The object under the first of these names that is there; its keys are parameters."""
    found: Any = next((document[name] for name in names if name in document), {})
    unknown = [k for k in found if k not in _KEYS] if isinstance(found, dict) else [shown(found)]
    if unknown:
        raise ConfigurationError(
            f"{file}: {shown(unknown[0])} is no parameter; they are cores, mos, ols, batch-size, "
            "instances, set-size"
        )
    return dict(found)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_SIZE
