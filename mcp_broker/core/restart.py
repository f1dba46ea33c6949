"""How often a process may be restarted, and after how long: OTP's restart intensity, with backoff.

Rules:

1. A death during a call belongs to that call: it is not counted, and the restart has no delay.
2. Every other death of a life that was not healthy is counted. More than ``intensity`` of them within
   ``period_s`` and we give up.
3. The first restart has no delay, the next ones wait exponentially longer, less a share of jitter.
4. A start that failed because the machine had nothing left (descriptors, memory, processes) is not counted either, but
   waits: it is nobody's fault, and passes.
5. A life that was ready for ``healthy_s`` clears the record before its own death is counted.

Pure: time and jitter are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """The numbers behind the rules.

    Args:
        intensity: counted deaths within the period that are still answered by a restart; None: always.
        period_s: the window in which deaths are counted.
        base_s: delay of the second restart in a row.
        factor: each further delay is this many times the last.
        delay_s_max: where the delay stops growing.
        jitter: share of the delay that the jitter may take away, so that many do not start in step.
        shortage_s_max: where the delay stops growing when the machine has nothing left: trying costs little, and what
            it lacked may be back at any moment.
        healthy_s: a life that was ready for this long clears the record.
    """

    intensity: int | None = 5
    period_s: float = 60.0
    base_s: float = 0.2
    factor: float = 2.0
    delay_s_max: float = 10.0
    jitter: float = 0.5
    shortage_s_max: float = 1.0
    healthy_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Restart:
    """Try again, ``after_s`` from now (0: at once)."""

    after_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Too many deaths; ``reason`` says how many in how long."""

    reason: str


Verdict = Restart | GiveUp


class Restarts:
    """The record of deaths, shared by all that fail together (a pool's processes).

    Args:
        policy: see :class:`Policy`.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        #: instants of counted deaths within the period, oldest first
        self._deaths: tuple[float, ...] = ()
        #: counted deaths since the last healthy life: the backoff's exponent
        self._in_a_row = 0
        #: restarts granted, of every kind, for people
        self.total = 0

    def forget(self) -> None:
        """Start a clean record, because an operator says so."""
        self._deaths, self._in_a_row = (), 0

    def after_death(self, now: float, *, counted: bool, ready_for_s: float, jitter: float) -> Verdict:
        """Decide what follows a death.

        Args:
            now: monotonic seconds.
            counted: False when the death is charged to a call.
            ready_for_s: how long that life had been ready; 0 if it never was.
            jitter: a random number of [0, 1).
        """
        if ready_for_s >= self.policy.healthy_s:
            self.forget()
        if not counted:
            self.total += 1
            return Restart(0.0)
        since = now - self.policy.period_s
        self._deaths = (*(died_at for died_at in self._deaths if died_at > since), now)
        if self.policy.intensity is not None and len(self._deaths) > self.policy.intensity:
            return GiveUp(f"died {len(self._deaths)} times within {now - self._deaths[0]:.1f} s")
        return self._again(self._delay_s(jitter))

    def after_shortage(self, jitter: float) -> Restart:
        """Decide what follows a start for which the machine had nothing left: a delay, and never an end.

        Args:
            jitter: a random number of [0, 1).
        """
        return self._again(min(self._delay_s(jitter), self.policy.shortage_s_max))

    def _again(self, after_s: float) -> Restart:
        self._in_a_row += 1
        self.total += 1
        return Restart(after_s)

    def _delay_s(self, jitter: float) -> float:
        if self._in_a_row == 0:
            return 0.0
        # the exponent is bounded, so that a process which flaps for a year does not overflow a float
        grown_s = self.policy.base_s * self.policy.factor ** min(self._in_a_row - 1, 32)
        return min(grown_s, self.policy.delay_s_max) * (1.0 - self.policy.jitter * jitter)
