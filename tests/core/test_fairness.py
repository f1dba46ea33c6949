"""The backlog by itself: who is served next, whatever waits."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mcp_broker.core.fairness import CLASSES, Backlog, Entry, Flow, Gate, Level

AGE_S = 5.0


class Line:
    """A backlog whose entries are (principal, number), and short names for what happens to it."""

    def __init__(self) -> None:
        self.backlog: Backlog[tuple[str, int]] = Backlog(AGE_S)
        self._numbers = itertools.count()

    def add(self, principal: str, many: int = 1, now: float = 0.0, **settings: Any) -> list[int]:
        numbers = list(itertools.islice(self._numbers, many))
        for number in numbers:
            self.backlog.add(key(number), (principal, number), now, principal=principal, **settings)
        return numbers

    def served(self, most: int, now: float = 0.0) -> str:
        """Return the principals that are served next, one letter each."""
        return "".join(principal for principal, _ in self.backlog.take(most, now))


def key(number: int) -> bytes:
    return number.to_bytes(8, "big")


@pytest.fixture
def line() -> Line:
    return Line()


# -- between principals ---------------------------------------------------------------------------


def test_one_principal_is_served_in_the_order_of_arrival(line: Line) -> None:
    numbers = line.add("a", 5)
    assert [number for _, number in line.backlog.take(5, 0.0)] == numbers
    assert line.backlog.take(1, 0.0) == []


def test_flood_of_one_principal_does_not_keep_another_waiting(line: Line) -> None:
    line.add("a", 1000)
    assert line.served(3) == "aaa"
    line.add("b")
    assert "b" in line.served(2)


def test_principals_take_turns(line: Line) -> None:
    for principal in "abc":
        line.add(principal, 3)
    assert line.served(9) == "abcabcabc"


def test_turn_is_as_long_as_the_weight(line: Line) -> None:
    line.add("a", 9, weight=3)
    line.add("b", 3)
    assert line.served(12) == "aaabaaabaaab"


def test_latest_weight_counts(line: Line) -> None:
    line.add("a", 4, weight=1)
    line.add("a", 1, weight=2)
    line.add("b", 4)
    assert line.served(6) == "aabaab"


def test_costly_calls_are_paid_with_later_turns(line: Line) -> None:
    line.add("a", 2, cost=3)
    line.add("b", 6)
    assert line.served(8) == "abbbabbb"


def test_costly_calls_of_one_alone_are_served_at_once(line: Line) -> None:
    line.add("a", 3, cost=17)
    assert line.served(3) == "aaa"


def test_who_comes_back_with_one_call_at_a_time_does_not_begin_at_the_head_again(line: Line) -> None:
    line.add("b", 10)
    got = "a"
    for _ in range(10):
        if got[-1] == "a":
            line.add("a", weight=100)
        got += line.served(1)
    assert got == "ababababababab"[: len(got)]


@settings(deadline=None, max_examples=60)
@given(
    weights=st.lists(st.integers(1, 10), min_size=2, max_size=5),
    costs=st.lists(st.integers(1, 17), min_size=5, max_size=5),
    batch=st.integers(1, 40),
)
def test_busy_principals_are_served_by_their_weights_within_one_turn(
    weights: list[int], costs: list[int], batch: int
) -> None:
    """Deficit round robin's bound: work over weight differs by no more than a turn and the largest cost."""
    line = Line()
    rounds = 30
    names = [chr(ord("a") + number) for number in range(len(weights))]
    weight_of, cost_of = dict(zip(names, weights, strict=True)), dict(zip(names, costs, strict=False))
    for name in names:
        line.add(name, rounds * weight_of[name], weight=weight_of[name], cost=cost_of[name])
    served: Counter[str] = Counter()
    while all(served[name] + batch < rounds * weight_of[name] for name in names):
        served.update(line.served(batch))
        shares = {name: served[name] * cost_of[name] / weight_of[name] for name in names}
        for one, other in itertools.combinations(names, 2):
            slack = 2 + cost_of[one] / weight_of[one] + cost_of[other] / weight_of[other]
            assert abs(shares[one] - shares[other]) <= slack


# -- classes -----------------------------------------------------------------------------------------


def test_higher_class_is_served_first_and_the_next_one_when_it_is_empty(line: Line) -> None:
    line.add("c", 2, level=2)
    line.add("b", 2, level=1)
    line.add("a", 2, level=0)
    assert line.served(6) == "aabbcc"


def test_low_call_is_served_in_time_under_a_flood_above_it(line: Line) -> None:
    line.add("z", 1, level=2)
    line.add("a", 2, level=0)
    now = 0.0
    while "z" not in line.served(1, now):
        line.add("a", 2, now, level=0)
        now += 0.01
        assert now < 2 * AGE_S + 1
    assert now >= 2 * AGE_S, "and not before its time"


def test_flood_of_old_low_calls_does_not_starve_anybody_above(line: Line) -> None:
    line.add("z", 10_000, level=2)
    line.served(0, AGE_S)
    now = 3 * AGE_S
    line.served(100, AGE_S)
    line.served(100, now)
    line.add("a", 10, now, level=0)
    assert line.served(20, now).count("a") >= 9


# -- gates -------------------------------------------------------------------------------------------


def test_closed_gate_holds_up_nobody_else(line: Line) -> None:
    gate = Gate(2)
    line.add("a", 5, gate=gate)
    line.add("b", 5, gate=gate)
    line.add("b", 2)
    assert sorted(line.served(10)) == ["a", "b", "b", "b"]
    assert not line.backlog.is_ready
    line.backlog.release(gate)
    assert len(line.served(10)) == 1


def test_places_of_a_gate_go_round(line: Line) -> None:
    gate = Gate(1)
    line.add("a", 3, gate=gate)
    line.add("b", 3, gate=gate, weight=2)
    got = ""
    for _ in range(6):
        got += line.served(3)
        line.backlog.release(gate)
    assert got == "abbaba"


def test_order_inside_a_principal_holds_across_an_open_gate(line: Line) -> None:
    gate = Gate(10)
    first = line.add("a", 2)
    second = line.add("a", 2, gate=gate)
    third = line.add("a", 2)
    assert [number for _, number in line.backlog.take(6, 0.0)] == [*first, *second, *third]


@pytest.mark.parametrize("greedy", ["a", "b"])
def test_nobody_starves_at_a_gate_where_another_has_other_things_to_do(line: Line, greedy: str) -> None:
    """One of two asks for more of everything all the time; both get on behind the gate."""
    gate = Gate(1)
    line.add("a", 200, gate=gate)
    line.add("b", 200, gate=gate)
    line.add(greedy, 5)
    gated: Counter[str] = Counter()
    for _ in range(100):
        line.add(greedy, 2)
        for principal, number in line.backlog.take(2, 0.0):
            if number < 400:
                gated[principal] += 1
                line.backlog.release(gate)
    assert min(gated["a"], gated["b"]) >= 10, gated


def test_idle_place_does_not_wait_for_one_who_has_older_things_to_do(line: Line) -> None:
    gate = Gate(1)
    line.add("a", 1000)
    line.add("a", 1, gate=gate)
    line.add("b", 1, gate=gate)
    assert "b" in line.served(4)


# -- again -------------------------------------------------------------------------------------------


def test_what_is_queued_again_comes_first_in_its_old_order(line: Line) -> None:
    numbers = line.add("a", 3)
    line.add("b", 3, level=0)
    taken = line.backlog.take(2, 0.0)
    for principal, number in reversed(taken):
        line.backlog.requeue(key(number), (principal, number))
    assert line.backlog.take(2, 0.0) == taken
    assert key(numbers[0]) not in line.backlog


def test_what_is_queued_again_still_passes_its_gate(line: Line) -> None:
    gate = Gate(1)
    line.add("a", 2, gate=gate)
    (first,) = line.backlog.take(5, 0.0)
    line.backlog.release(gate)
    (second,) = line.backlog.take(5, 0.0)
    line.backlog.requeue(key(first[1]), first, gate)
    assert line.backlog.take(5, 0.0) == []
    line.backlog.release(gate)
    assert line.backlog.take(5, 0.0) == [first]
    assert second != first


# -- everything at once ---------------------------------------------------------------------------------


class Model(RuleBasedStateMachine):
    """The backlog against the plainest description of it."""

    def __init__(self) -> None:
        super().__init__()
        self.line: Backlog[int] = Backlog(AGE_S)
        self.gates = (Gate(1), Gate(3))
        self.now = 0.0
        self.numbers = itertools.count()
        #: number -> (principal, class, gate)
        self.waiting: dict[int, tuple[str, int, Gate | None]] = {}
        self.aged: set[int] = set()
        self.passed: list[Gate] = []

    @rule(
        principal=st.sampled_from("abcd"),
        level=st.integers(0, CLASSES - 1),
        gate=st.sampled_from([None, None, 0, 1]),
        weight=st.integers(1, 3),
        cost=st.sampled_from([1, 1, 4]),
    )
    def add(self, principal: str, level: int, gate: int | None, weight: int, cost: int) -> None:
        number = next(self.numbers)
        barrier = None if gate is None else self.gates[gate]
        self.line.add(
            key(number), number, self.now,
            principal=principal, weight=weight, level=level, gate=barrier, cost=cost,
        )  # fmt: skip
        self.waiting[number] = principal, level, barrier

    @rule(most=st.integers(1, 5))
    def take(self, most: int) -> None:
        was_ready = self.line.is_ready
        before = dict(self.waiting)
        taken = self.line.take(most, self.now)
        assert bool(taken) == was_ready
        assert len(taken) <= most
        assert len(set(taken)) == len(taken)
        for number in taken:
            principal, level, gate = self.waiting.pop(number)
            if gate is not None:
                self.passed.append(gate)
            ahead = [
                other
                for other, (whose, where, behind) in before.items()
                if other < number and (whose, where, behind) == (principal, level, gate)
            ]
            if not self.aged:
                assert not set(ahead) & self.waiting.keys(), "first come, first served"
        if len(taken) < most:
            able = [
                number
                for number, (_, _, gate) in self.waiting.items()
                if gate is None or gate.held < gate.limit
            ]
            assert not able, "nothing waits that could be served"

    @precondition(lambda self: self.waiting)
    @rule(chance=st.integers(0, 1000))
    def remove(self, chance: int) -> None:
        number = sorted(self.waiting)[chance % len(self.waiting)]
        assert self.line.remove(key(number)) == number
        assert self.line.remove(key(number)) is None
        del self.waiting[number]

    @precondition(lambda self: self.passed)
    @rule(chance=st.integers(0, 1000), again=st.booleans())
    def release(self, chance: int, again: bool) -> None:
        gate = self.passed.pop(chance % len(self.passed))
        self.line.release(gate)
        if again:
            number = next(self.numbers)
            self.line.requeue(key(number), number, gate)
            self.waiting[number] = "again", -1, gate
            self.aged.add(number)

    @rule(seconds=st.sampled_from([0.1, AGE_S]))
    def later(self, seconds: float) -> None:
        self.now += seconds
        if seconds == AGE_S:
            self.aged |= self.waiting.keys()

    @invariant()
    def counts_agree(self) -> None:
        assert len(self.line) == len(self.waiting)
        assert set(self.line.values()) == self.waiting.keys()
        assert set(self.line) == {key(number) for number in self.waiting}
        for gate in self.gates:
            assert 0 <= gate.held == self.passed.count(gate) <= gate.limit
            assert gate.waiting == sum(behind is gate for _, _, behind in self.waiting.values())

    def teardown(self) -> None:
        """Whatever it went through, it can be emptied, and nothing is left in it."""
        for _ in range(len(self.waiting) + 1):
            for gate in self.passed:
                self.line.release(gate)
            self.passed.clear()
            self.take(5)
        assert not self.line.count
        for level in self.line._levels:
            assert not level.order
            assert not level.gates
            assert len(level.flows) == len(level.ring), "only emptied flows whose turn has not come"


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("seed", range(3))
def test_nobody_waits_much_longer_than_his_turn_whatever_others_do(seed: int) -> None:
    """In one class, a call is served before every other principal has had a turn more than there are calls before it."""
    chance = random.Random(seed)
    line = Line()
    weights = dict(zip("abcdefgh", itertools.cycle((1, 2, 5)), strict=False))
    deadline: dict[int, int] = {}
    served = 0
    waiting: Counter[str] = Counter()
    for _ in range(4000):
        name = chance.choice("aaaaaabcdefgh")
        if waiting[name] < 50:
            (number,) = line.add(name, weight=weights[name])
            waiting[name] += 1
            turns = -(-waiting[name] // weights[name]) + 1
            deadline[number] = served + turns * sum(weights.values()) + waiting[name]
        if chance.random() < 0.7:
            for who, number in line.backlog.take(chance.randrange(1, 4), 0.0):
                served += 1
                waiting[who] -= 1
                assert served <= deadline.pop(number)


def test_taking_costs_the_same_with_many_waiting_as_with_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: flows that are looked at while one entry is taken from behind a busy gate."""
    looked = 0
    choose = Level._choose

    def counting(level: Level, flow: Flow) -> Entry | None:
        nonlocal looked
        looked += 1
        return choose(level, flow)

    monkeypatch.setattr(Level, "_choose", counting)

    def looks(principals: int) -> int:
        nonlocal looked
        line, gate = Line(), Gate(1)
        for number in range(principals):
            line.add(f"p{number}", 2, gate=gate)
        line.served(1)
        looked = 0
        for _ in range(10):
            line.backlog.release(gate)
            assert line.served(1)
        return looked

    assert looks(2000) == looks(20)
