"""What a teacher that was never trained for this is told: when to plan, and how.

After arXiv:2509.03581: sixteen planning styles (its prompts 1 to 16), acting on a plan
made before (17), never planning (18), planning now (19), and deciding by oneself (20).
A student is never told any of this; it learns from what the teacher then says.

Paper: the wording is our own, after the description of each prompt.
"""

_PLAN_THEN_ACT = (
    "{how} Keep the plan brief, and write it between {open} and {close}. Then give "
    "exactly one action from the list."
)
_HOW = {
    "subgoal": "Name the next subgoal that brings you nearer to the goal of the game.",
    "milestone": "Name the next milestone, and what has to be there to reach it.",
    "short_sequence": "Write down the short sequence of actions you are about to do.",
    "step_by_step": "Write a step-by-step plan for what to do next.",
    "gap_bridging": "Say what you have, what you need, and how to close the gap.",
    "high_level_strategy": "Describe your strategy for the next stretch of the game.",
    "justified": "Say what you will do next, and justify it in a few words.",
    "reasoning_process": "Reason about what you see and have, and conclude a plan.",
    "approach_comparison": "Compare two ways to go on, and choose the better one.",
    "efficiency": "Find the way to go on that takes the fewest steps.",
    "information_gap": "Say what you know, what you do not know, and how to find out.",
    "logical_sequence": "Order what is to be done so that each thing allows the next.",
    "short_term_goal": "Set yourself one goal for the next few steps.",
    "practical_progress": "Say how far you are, and what makes progress from here.",
    "intent_and_approach": "State your intent, and how you are going about it.",
    "next_steps": "List the next steps.",
}
STYLE_PROMPTS = {
    style: _PLAN_THEN_ACT.replace("{how}", how) for style, how in _HOW.items()
}
PLAN = _PLAN_THEN_ACT.replace("{how}", "Make a high-level plan from what you see.")
ACT = (
    "Look at your previous plan and at what you see. Give exactly one action from the "
    "list, and nothing else."
)
NEVER = (
    "Look at what you have seen. Give exactly one action from the list, and nothing "
    "else."
)
DYNAMIC = (
    "Look at your plan and at what you see. If there is no plan, or it is outdated, "
    "write a brief new one between {open} and {close}; else go on without repeating "
    "it. Then give exactly one action from the list."
)


def planning_prompt(style: str, open_tag: str, close_tag: str) -> str:
    """The prompt of a turn that is to plan.

    Args:
        style: one of ``STYLE_PROMPTS``; an empty one leaves the way of planning open.
        open_tag: what a plan is to begin with.
        close_tag: what it is to end with.

    Raises:
        ValueError: there is no such style.
    """
    if style and style not in STYLE_PROMPTS:
        raise ValueError(
            f"collect.styles: {style!r} is no style that a teacher can be asked for; "
            f"there are {', '.join(STYLE_PROMPTS)}"
        )
    return with_tags(STYLE_PROMPTS[style] if style else PLAN, open_tag, close_tag)


def with_tags(prompt: str, open_tag: str, close_tag: str) -> str:
    """Write the tags of plans into a prompt."""
    return prompt.replace("{open}", open_tag).replace("{close}", close_tag)
