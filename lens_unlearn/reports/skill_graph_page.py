"""`skill_graph_page`: a skill graph as one HTML document: a sentence an edge, the figure, and where the skills' neurons are.

Knows what a graph's tables hold; `templates/skill_graph.html` writes them. Knows nothing of how anything was removed.
"""

import json

from lens_unlearn.evaluation.metrics import words
from lens_unlearn.evaluation.skill_graph import ALL, BY_LAYER, SkillGraph
from lens_unlearn.figures.skill_graph import skill_graph
from lens_unlearn.reports.figure_html import drawing
from lens_unlearn.reports.numbers import CSV_LIMIT, csv_data
from lens_unlearn.reports.settings import LIMIT
from lens_unlearn.reports.templating import render

__all__ = ["skill_graph_page"]


def skill_graph_page(graph: SkillGraph) -> str:
    """Write a skill graph as one self-contained HTML document, which refers to no address outside itself.

    Args:
        graph: What `lu.skill_graph` returned.
    """
    from plotly.offline import get_plotlyjs

    table = graph.csv()
    correlations = graph.correlations()
    ratios = graph.ratios()
    settings = json.dumps(graph.provenance, indent=2, default=str, ensure_ascii=False)
    return str(
        render(
            "skill_graph.html",
            model=graph.provenance.get("model") or "a language model",
            method=graph.provenance.get("method", ""),
            control=next(iter((graph.provenance.get("controls") or {}).values()), "as much at random"),
            seeds=graph.provenance.get("seeds", ""),
            measured=words(graph.metric),
            skills=graph.skills,
            costs=graph.costs,
            edges=graph.edges,
            spared=[c for c in graph.costs.values() if not c.own and c.beyond.high < 0],
            unknown=[c for c in graph.costs.values() if not c.own and c.beyond.low != c.beyond.low],
            figures=[drawing(0, "", skill_graph(graph))],
            overlaps=[row for row in graph.overlaps().to_dict("records") if row["site"] == ALL],
            correlations={
                (row["a"], row["b"], row["site"]): row["spearman"]
                for row in correlations.to_dict("records")
                if row["site"] in (ALL, BY_LAYER)
            },
            places=(ALL, BY_LAYER),
            ratios=ratios.to_dict("records"),
            data=csv_data(table) if len(table) <= CSV_LIMIT else "",
            settings=render("settings.html", command=graph.provenance.get("command", ""), settings=settings[:LIMIT]),
            library=get_plotlyjs(),
        )
    )
