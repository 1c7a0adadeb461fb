"""The demo: a service that writes skills, in plain DSPy, tracked by three decorators.

Each job becomes a run in MLflow with a child run per phase:

    skill_creation_{job_id}     8 LM calls; artifacts: skill_content.md, metadata.json, validation_report.json, ...
    ├── understanding           3 LM calls, a synchronous module in a thread
    ├── generation              3 LM calls, an asynchronous module
    └── validation              2 LM calls, a method; metric: quality_score
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

import dspy
from pydantic import BaseModel, Field

from skilltrace import current_run, tracked_job, tracked_phase

# --- What goes in and what comes out ---------------------------------------------------------------------------------


@dataclass
class SkillRequest:
    """An order for one skill."""

    topic: str
    job_id: str
    user_id: str
    skill_type: str = "guide"


class SkillMetadata(BaseModel):
    """What a catalogue shows of a skill."""

    name: str = Field(description="lower case, words joined by hyphens")
    description: str
    skill_type: Literal["guide", "checklist", "reference"]
    tags: list[str]


class ValidationReport(BaseModel):
    """What the reviewer says of a skill."""

    score: float = Field(ge=0, le=1)
    passed: bool
    issues: list[str]


@dataclass
class SkillResult:
    """A finished skill; each field becomes an artifact of the job's run."""

    skill_content: str
    metadata: SkillMetadata
    validation_report: ValidationReport
    conversation_history: list[dict[str, str]]


# --- What the language model is asked --------------------------------------------------------------------------------


class AnalyzeTopic(dspy.Signature):
    """Find out what the reader of a skill wants to be able to do, and who the reader is."""

    topic: str = dspy.InputField()
    skill_type: str = dspy.InputField()
    intent: str = dspy.OutputField(desc="one sentence")
    audience: str = dspy.OutputField()


class ListRequirements(dspy.Signature):
    """List what a skill must contain to serve its reader."""

    topic: str = dspy.InputField()
    intent: str = dspy.InputField()
    audience: str = dspy.InputField()
    requirements: list[str] = dspy.OutputField(desc="each can be checked by reading the skill")


class PlanSections(dspy.Signature):
    """Plan the sections of a skill."""

    topic: str = dspy.InputField()
    requirements: list[str] = dspy.InputField()
    outline: list[str] = dspy.OutputField(desc="headings, in reading order")


class FindExamples(dspy.Signature):
    """Find examples that show the skill at work."""

    topic: str = dspy.InputField()
    audience: str = dspy.InputField()
    examples: list[str] = dspy.OutputField()


class WriteSkill(dspy.Signature):
    """Write the skill as a SKILL.md: front matter, then one section for each heading of the outline."""

    topic: str = dspy.InputField()
    intent: str = dspy.InputField()
    requirements: list[str] = dspy.InputField()
    outline: list[str] = dspy.InputField()
    examples: list[str] = dspy.InputField()
    skill_content: str = dspy.OutputField(desc="Markdown")


class DescribeSkill(dspy.Signature):
    """Describe a skill for the catalogue."""

    topic: str = dspy.InputField()
    audience: str = dspy.InputField()
    skill_type: str = dspy.InputField()
    metadata: SkillMetadata = dspy.OutputField()


class ReviewSkill(dspy.Signature):
    """Name what a skill lacks, measured by its requirements."""

    skill_content: str = dspy.InputField()
    requirements: list[str] = dspy.InputField()
    issues: list[str] = dspy.OutputField(desc="empty if there are none")


class ScoreSkill(dspy.Signature):
    """Grade a skill, and decide whether it can be published."""

    skill_content: str = dspy.InputField()
    requirements: list[str] = dspy.InputField()
    issues: list[str] = dspy.InputField()
    score: float = dspy.OutputField(desc="from 0 to 1")
    passed: bool = dspy.OutputField()


# --- The program -----------------------------------------------------------------------------------------------------


@tracked_phase("understanding")
class Understand(dspy.Module):
    """From a topic to a plan."""

    def __init__(self) -> None:
        super().__init__()
        self.analyze = dspy.ChainOfThought(AnalyzeTopic)
        self.require = dspy.Predict(ListRequirements)
        self.plan = dspy.Predict(PlanSections)

    def forward(self, topic: str, skill_type: str) -> dspy.Prediction:
        """Make the plan: intent, audience, requirements and outline."""
        goal = self.analyze(topic=topic, skill_type=skill_type)
        needs = self.require(topic=topic, intent=goal.intent, audience=goal.audience)
        plan = self.plan(topic=topic, requirements=needs.requirements)
        return dspy.Prediction(
            intent=goal.intent, audience=goal.audience, requirements=needs.requirements, outline=plan.outline
        )


@tracked_phase("generation")
class Generate(dspy.Module):
    """From a plan to a skill."""

    def __init__(self) -> None:
        super().__init__()
        self.exemplify = dspy.Predict(FindExamples)
        self.write = dspy.ChainOfThought(WriteSkill)
        self.describe = dspy.Predict(DescribeSkill)

    async def aforward(self, topic: str, skill_type: str, plan: dspy.Prediction) -> dspy.Prediction:
        """Write the skill and its metadata; two questions that do not need each other are asked at once."""
        found, described = await asyncio.gather(
            self.exemplify.acall(topic=topic, audience=plan.audience),
            self.describe.acall(topic=topic, audience=plan.audience, skill_type=skill_type),
        )
        written = await self.write.acall(
            topic=topic,
            intent=plan.intent,
            requirements=plan.requirements,
            outline=plan.outline,
            examples=found.examples,
        )
        return dspy.Prediction(skill_content=written.skill_content, metadata=described.metadata)


class SkillService:
    """The service that an application calls, for instance from an HTTP route."""

    def __init__(self) -> None:
        self.understand = Understand()
        self.generate = Generate()
        self.review = dspy.Predict(ReviewSkill)
        self.score = dspy.Predict(ScoreSkill)

    @tracked_job("skill_creation_{job_id}")
    async def create_skill(self, request: SkillRequest) -> SkillResult:
        """Make one skill."""
        plan = await asyncio.to_thread(self.understand, topic=request.topic, skill_type=request.skill_type)
        skill = await self.generate.acall(topic=request.topic, skill_type=request.skill_type, plan=plan)
        report = await self.validate(skill.skill_content, plan.requirements)
        if run := current_run():
            run.log_metric("issues", len(report.issues))
        return SkillResult(
            skill_content=skill.skill_content,
            metadata=skill.metadata,
            validation_report=report,
            conversation_history=[
                {"role": "user", "content": f"Write a {request.skill_type}: {request.topic}"},
                {"role": "assistant", "content": f"{plan.intent} It must: {'; '.join(plan.requirements)}."},
                {"role": "assistant", "content": skill.skill_content},
                {"role": "reviewer", "content": "\n".join(report.issues) or "Nothing to add."},
            ],
        )

    @tracked_phase("validation", metrics={"quality_score": "score"})
    async def validate(self, skill_content: str, requirements: list[str]) -> ValidationReport:
        """Review and grade a skill."""
        review = await self.review.acall(skill_content=skill_content, requirements=requirements)
        grade = await self.score.acall(skill_content=skill_content, requirements=requirements, issues=review.issues)
        return ValidationReport(score=grade.score, passed=grade.passed, issues=review.issues)
