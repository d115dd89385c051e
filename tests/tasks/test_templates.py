from grass_ray.tasks.rows import Row
from grass_ray.tasks.templates import render_prompt, render_response


def row(instruction="  How many?\n", input="", output="\nA: 3 + 4 = 7. The answer is 7. "):
    return Row(instruction=instruction, input=input, output=output, answer="7")


def test_clean_is_one_tidy_form():
    assert render_prompt(row(), "clean") == (
        "Write a response that completes the instruction.\n\n### Instruction:\nHow many?\n\n### Response:\n"
    )


def test_published_keeps_the_white_space_of_the_published_evaluation():
    lines = render_prompt(row("How many?"), "published").split("\n")
    indent = " " * 16
    assert lines[0].endswith("completes the request. ")
    assert lines[1:] == ["", indent + "### Instruction:", indent + "How many?", "", indent + "### Response:", indent]


def test_an_input_gets_its_own_section():
    for template in ("clean", "published"):
        prompt = render_prompt(row(input="3 and 4"), template)
        assert prompt.index("### Instruction:") < prompt.index("### Input:") < prompt.index("3 and 4")
        assert "### Input:" not in render_prompt(row(), template)


def test_braces_in_a_question_are_text():
    assert "{input} {x}" in render_prompt(row("set {input} {x}"), "clean")


def test_response_has_no_white_space_around_it():
    assert render_response(row()) == "A: 3 + 4 = 7. The answer is 7."
