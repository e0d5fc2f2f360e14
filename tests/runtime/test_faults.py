"""SIGTERM to a process alone, and warnings in place of errors."""

import os
import signal

import pytest

from advprop_jax.errors import InputError
from advprop_jax.runtime import agreement, faults
from advprop_jax.runtime.faults import Preempted, Preemption, warned_of


def test_sigterm_is_noted_and_the_loop_asks():
  before = signal.getsignal(signal.SIGTERM)
  with Preemption() as preemption:
    assert not preemption.reached()
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.reached()
    assert preemption.reached()
  assert signal.getsignal(signal.SIGTERM) == before


def test_after_the_last_step_it_strikes_at_once():
  """Also where it came before: the loop did not ask any more."""
  before = signal.getsignal(signal.SIGTERM)
  with Preemption() as preemption:
    preemption.at_once()
    with pytest.raises(Preempted, match="resume with the same command"):
      signal.raise_signal(signal.SIGTERM)
  with Preemption() as preemption:
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted):
      preemption.at_once()
  assert signal.getsignal(signal.SIGTERM) == before


def test_in_a_pod_the_signal_is_not_forgotten(monkeypatch):
  """JAX says it at one point alone, which may be the last step's."""
  asked = []
  monkeypatch.setattr(agreement, "store", object)
  monkeypatch.setattr(faults.multihost_utils, "reached_preemption_sync_point",
                      lambda point: asked.append(point) or point == 2)
  preemption = Preemption()
  assert [preemption.reached() for _ in range(4)] == [False, True, True, True]
  assert asked == [1, 2, 3, 4]         # all processes ask as often
  with pytest.raises(Preempted):
    preemption.at_once()


def test_an_error_becomes_a_warning_where_training_is_to_go_on():
  said = []
  with warned_of(True, said.append):
    raise InputError("the disk is full")
  assert said == ["Warning: the disk is full"]
  with pytest.raises(InputError), warned_of(False, said.append):
    raise InputError("the disk is full")
  with pytest.raises(ValueError, match="bug"), warned_of(True, said.append):
    raise ValueError("bug")
