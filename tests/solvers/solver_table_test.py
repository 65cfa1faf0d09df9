from bilevel_flax import contrib, solvers
from bilevel_flax.solvers import cheap_steps
from bilevel_flax.solvers import table as solver_table


def test_every_method_has_one_row():
    named = [row.name for row in solver_table.ROWS]
    methods = {*solvers.__all__, *contrib.__all__, "inner_only"} - {"single_loop", "on_rows"}
    assert len(set(named)) == len(named)
    assert set(named) == methods


def test_the_table_lines_up():
    lines = solver_table.render().splitlines()[: len(solver_table.ROWS) + 1]
    starts = {line.index(row.use) for line, row in zip(lines[1:], solver_table.ROWS, strict=True)}
    assert len(starts) == 1


def test_the_cost_line_tells_what_the_thrifty_settings_cost():
    text = solver_table.render()
    for fraction, every, shown in ((1, 1, "4"), (0.5, 1, "2.5"), (1, 2, "2.5"), (0.25, 1, "1.75")):
        assert cheap_steps.units(fraction, every) == float(shown)
        assert shown in text.partition("cost: ")[2]
    assert f"{cheap_steps.units(update_every=4, adjoint_update_every=2):.2f}" == "1.46"
    assert "update_every=4 adjoint_update_every=2, is 1.46" in text
