"""Dynamic steering: what is read from the stream decides, step by step, what is added to it."""

from steer_compile.dynamic.actions import ClearOverride, SetMonitor, SetOverride, SetScale, SetTier
from steer_compile.dynamic.controller import Controller
from steer_compile.dynamic.dynamics import Dynamics, Limits
from steer_compile.dynamic.gates import Gate
from steer_compile.dynamic.steering_controller import Decision, RequestState, SteeringController, Values
from steer_compile.dynamic.views import RequestView, StepView

__all__ = [
    "ClearOverride",
    "Controller",
    "Decision",
    "Dynamics",
    "Gate",
    "Limits",
    "RequestState",
    "RequestView",
    "SetMonitor",
    "SetOverride",
    "SetScale",
    "SetTier",
    "SteeringController",
    "StepView",
    "Values",
]
