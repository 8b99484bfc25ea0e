"""What the tests of chat models ask, and what a model that behaves answers."""

from langchain_core.messages import HumanMessage

from graph.planning.plan import Plan
from tests.openai_server import DEFAULT_PLAN

KEY = "sk-proj-Zk39_secret-Qx7"
PLAN = Plan.model_validate(DEFAULT_PLAN)
QUESTION = [HumanMessage("Plan, as JSON.")]
