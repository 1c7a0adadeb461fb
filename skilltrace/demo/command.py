"""What `skilltrace demo` does: make a skill with a language model, and read the run back that stands in MLflow then."""

from __future__ import annotations

import asyncio
import os
import secrets
from contextlib import ExitStack

from skilltrace import configure, flush, mlflow_bridge, status
from skilltrace.config import Settings
from skilltrace.demo.model_server import ModelServer
from skilltrace.errors import DeliveryError
from skilltrace.tree import Node

TOPIC = "Writing Python decorators"
EXPERIMENT = "skill-creation"
# The local server answers under this name, so that DSPy knows a price and the run shows what the calls would have cost.
LOCAL_MODEL = "openai/gpt-4o-mini"


def make_skill(topic: str = TOPIC, model: str | None = None, user_id: str = "demo") -> tuple[Node, Settings]:
    """Run one job of the demo's service.

    Args:
        topic: What the skill is about.
        model: A provider's model by DSPy's name, with its key in the environment; None: the local model server.
        user_id: For whom.

    Returns:
        The job and its phases as MLflow has them, and the settings that were in force.

    Raises:
        DeliveryError: where MLflow has not got them in time.
    """
    # A price list from the network would be nice to have; the one that comes with the package will do.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import dspy

    from skilltrace.demo.service import SkillRequest, SkillService

    settings = configure(EXPERIMENT)
    request = SkillRequest(topic=topic, job_id=f"job_{secrets.token_hex(6)}", user_id=user_id)
    with ExitStack() as stack:
        if model is None:
            server = stack.enter_context(ModelServer())
            lm = dspy.LM(LOCAL_MODEL, api_base=server.base_url, api_key="local", cache=False)
        else:
            lm = dspy.LM(model)
        stack.enter_context(dspy.context(lm=lm))
        asyncio.run(SkillService().create_skill(request))
    if not flush(60):
        raise DeliveryError(f"{settings.target.uri} has not got the job yet: {status().last_error}")
    return mlflow_bridge.read_job(settings.target, request.job_id), settings
