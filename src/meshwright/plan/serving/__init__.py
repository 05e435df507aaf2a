"""How to serve a model: memory and time of a step, queues of requests, the best split for a target."""

from meshwright.plan.serving.result import ServingPins, ServingPlan, Target
from meshwright.plan.serving.search import make_serving_plan
from meshwright.plan.serving.splits import ServingQuery
from meshwright.plan.serving.time import SERVERS

__all__ = ["SERVERS", "ServingPins", "ServingPlan", "ServingQuery", "Target", "make_serving_plan"]
