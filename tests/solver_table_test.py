from bilevel_flax import solver_table, solvers


def test_every_method_has_one_row():
    named = [row.name for row in solver_table.ROWS]
    methods = set(solvers.__all__) - {"grid_search", "random_search"}
    assert len(set(named)) == len(named)
    assert set(named) == methods


def test_the_table_lines_up():
    lines = solver_table.render().splitlines()
    starts = {line.index(row.use) for line, row in zip(lines[1:], solver_table.ROWS, strict=True)}
    assert len(starts) == 1
