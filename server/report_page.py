"""The page of the report, a Jinja template: a Python file, because a Flower bundle carries nothing else."""

# ruff: noqa: E501

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>fedmedgan: {{ name }}</title>
<style>
body { margin: 0 auto; max-width: 66rem; padding: 2rem 1.5rem 4rem; background: #fff; color: #1c1c1c;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { margin: 0 0 .2rem; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid #d8d8d8; font-size: 1.3rem; }
h3 { margin: 1.4rem 0 .3rem; font-size: 1rem; }
p { max-width: 46rem; margin: .5rem 0; }
.muted, figcaption, caption { color: #5c5c5c; font-size: .875rem; }
.statement { margin: 1rem 0; padding: .8rem 1.1rem; border-left: 4px solid #0b6e99; background: #f1f7fa; font-size: 1.05rem; }
.warning { margin: 1rem 0; padding: .8rem 1.1rem; border-left: 4px solid #c8553d; background: #fcf3f0; }
.statement, .warning { max-width: 44rem; }
dl.facts { display: grid; grid-template-columns: repeat(4, 1fr); gap: .8rem 1.4rem; margin: 1.4rem 0; }
@media (max-width: 44rem) { dl.facts { grid-template-columns: 1fr 1fr; } }
dl.facts dt { color: #5c5c5c; font-size: .8rem; }
dl.facts dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
dl.facts dd small { font-size: .8rem; font-weight: 400; color: #5c5c5c; }
dl.words { display: grid; grid-template-columns: 9rem 1fr; gap: .4rem 1rem; max-width: 54rem; font-size: .925rem; }
dl.words dt { color: #5c5c5c; }
dl.words dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; margin: .6rem 0 1rem; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #e6e6e6; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; border-bottom-color: #9a9a9a; overflow-wrap: normal; }
td.n, th.n { text-align: right; }
table.settings { width: 100%; table-layout: fixed; }
table.settings td:first-child { width: 55%; color: #444; }
.columns { columns: 19rem 3; column-gap: 2rem; }
.columns > div { break-inside: avoid; padding-top: .1rem; }
.columns h3 { margin-top: .4rem; }
figure { margin: 0 0 1.2rem; break-inside: avoid; }
figure img, figure svg { display: block; max-width: 100%; height: auto; }
figure svg { width: 100%; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif !important; }
.pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 1.2rem 2rem; }
.key { display: inline-block; margin-right: 1.1rem; }
.key i { display: inline-block; width: 1.4rem; height: 0; margin-right: .35rem; border-top: 3px solid; vertical-align: middle; }
li { max-width: 46rem; }
code { font-family: ui-monospace, Consolas, "Liberation Mono", monospace; font-size: .92em; overflow-wrap: anywhere; }
@media print { body { padding: 0; max-width: none; font-size: 11px; } h2 { break-after: avoid; } .pairs { grid-template-columns: 1fr 1fr; } }
</style>
</head>
<body>
{% set sites = card.sites %}
{% set shared = card.secure_sum and card.secure_sum.noise_shares > 1 %}
<h1>{{ name }}</h1>
<p>
{{ sites|length }} {{ "site" if sites|length == 1 else "sites" }} trained one generator of {{ "grey" if config.image.channels == 1 else "colour" }} images of
{{ config.image.size }} x {{ config.image.size }} pixels in {{ config.image.classes|length }}
{{ "class" if config.image.classes|length == 1 else "classes" }}
({{ config.image.classes[:8]|join(", ") }}{{ ", …" if config.image.classes|length > 8 }}):
{% set refined = [info.rounds, config.refinements]|min %}
{% if config.warmup.share > 0 %}a warm-up{% if config.refinements %} of {{ 1 + refined }} of {{ 1 + config.refinements }} releases{% endif %}, then {% endif %}{% if config.training_rounds %}{{ info.rounds - refined }} of {{ config.training_rounds }} rounds{% else %}no round of training{% endif %}.
{% if "simulated" not in card.randomness %}The sites' ledgers and journals name this run <code>{{ info.run_id }}</code>. {% endif %}No image left a site; {% if shared %}the sums over the sites are private per patient, at the figures below, if nothing else is seen{% else %}what left is private per patient, at the figures below{% endif %}. The images shown here are synthetic.
</p>
<dl class="facts">
<div><dt>epsilon, worst site</dt><dd>{{ card.epsilon_max|up }}</dd></div>
<div><dt>delta</dt><dd>{{ "%g"|format(card.delta) }}</dd></div>
<div><dt>patients, declared</dt><dd>{{ "{:,}".format(sites.values()|sum(attribute="declared_patients")) }}</dd></div>
<div><dt>time of all rounds</dt><dd>{% if seconds < 600 %}{{ "%.0f"|format(seconds) }} <small>s</small>{% else %}{{ "%.1f"|format(seconds / 60) }} <small>min</small>{% endif %}</dd></div>
<div><dt>received from the sites</dt><dd>{{ upload_bytes|amount }}</dd></div>
<div><dt>sent to the sites</dt><dd>{{ download_bytes|amount }}</dd></div>
<div><dt>a site and round, down and up</dt><dd>{{ a_site[0]|amount }} and {{ a_site[1]|amount }}</dd></div>
{% if evaluation is not none %}
<div><dt>accuracy, TSTR</dt><dd>{{ evaluation.tstr_accuracy|percent }}</dd></div>
{% endif %}
</dl>
<p class="statement">{{ card.statement }}</p>
{% if "simulated" in card.randomness %}
<p class="warning"><strong>This was a simulation.</strong> The figures are what the same run costs when every site draws its own secret random numbers. Here they were {{ card.randomness|replace("simulated: ", "") }}.</p>
{% endif %}

<h2>What it draws</h2>
{% if unseen %}
<p class="warning"><strong>Not learned from any patient in the warm-up: {{ unseen|join(", ") }}.</strong> In the sums of all sites these classes do not stand out from the noise: no site has patients of them, or too few for this epsilon. What is drawn for them means nothing{% if config.training_rounds %}, unless the rounds of training brought them{% endif %}.</p>
{% endif %}
{% if final_sheet %}
<figure>
<img src="{{ final_sheet[1] }}" alt="Eight synthetic images of each class after round {{ final_sheet[0] }}">
<figcaption>Synthetic images of the averaged generator after round {{ final_sheet[0] }}, eight of each class, enlarged. Rows from the top: <strong>{{ config.image.classes|join(", ") }}</strong>. Not recordings of patients.</figcaption>
</figure>
{% else %}
<p class="muted">There are no sample sheets in this folder.</p>
{% endif %}
{% if class_sheets %}
<h3>The same latents while the generator learns</h3>
<div class="pairs">
{% for class, uri in class_sheets %}
<figure><img src="{{ uri }}" alt="Class {{ class }} over the first fit and the rounds"><figcaption>{{ class }}</figcaption></figure>
{% endfor %}
</div>
{% if config.image.classes|length > class_sheets|length %}
<p class="muted">{{ class_sheets|length }} of {{ config.image.classes|length }} classes; the others are in the folder <code>samples</code>.</p>
{% endif %}
{% endif %}

<h2>Privacy</h2>
{% if sites %}
{% set bounds = attack_bounds(card.epsilon_max, card.delta) %}
<p>In words: take someone who knows all other patients, holds {{ "the sums over the sites of what they sent" if shared else "everything that a site sent" }}, and guesses whether one
particular patient was among that site's patients. At even odds, at most {{ bounds[0]|percent }} of such guesses can be right;
with one false alarm in a thousand, at most {{ bounds[1]|percent }} of the patients can be found. These are the limits that
the figures alone guarantee, against every attack; they are not what an attack was seen to reach.
{% if card.epsilon_max > 5 %}At an epsilon this large they rule out little by themselves.{% endif %}</p>
<div class="wide">
<table>
<caption>What each site's own ledger had spent at its last release in this run; a ledger counts every run on the site's data</caption>
<tr><th>site</th><th class="n">patients, declared</th><th class="n">epsilon spent</th><th class="n">epsilon allowed</th><th>release</th><th class="n">times</th><th class="n">steps each</th><th class="n">noise multiplier</th><th class="n">sample rate</th></tr>
{% for name, site in sites.items() %}
{% for release in site.releases %}
<tr>
{% if loop.first %}
<td rowspan="{{ site.releases|length }}">{{ name }}</td>
<td class="n" rowspan="{{ site.releases|length }}">{{ "{:,}".format(site.declared_patients) }}</td>
<td class="n" rowspan="{{ site.releases|length }}"><strong>{{ site.epsilon_spent|up }}</strong></td>
<td class="n" rowspan="{{ site.releases|length }}">{{ "%g"|format(site.epsilon_allowed) }}</td>
{% endif %}
<td>{{ release.kind }}</td><td class="n">{{ release.count }}</td><td class="n">{{ release.steps }}</td><td class="n">{{ release.noise_multiplier|figure(4) }}</td><td class="n">{{ release.sample_rate|figure(4) }}</td>
</tr>
{% endfor %}
{% endfor %}
</table>
</div>
{% endif %}
<dl class="words">
<dt>Unit</dt><dd>{{ card.unit }}: {{ card.relation }}</dd>
<dt>Trust model</dt><dd>{{ card.trust_model }}</dd>
<dt>Warm-up</dt><dd>{{ card.mechanism.warm_up }}</dd>
{% if config.training_rounds %}<dt>Training</dt><dd>{{ card.mechanism.training }} (max_grad_norm {{ "%g"|format(card.mechanism.max_grad_norm) }})</dd>{% endif %}

<dt>Accountant</dt><dd>{{ card.accountant }}</dd>
<dt>Randomness</dt><dd>{{ card.randomness }}</dd>
<dt>Noise</dt><dd>{{ card.noise }}</dd>
</dl>
<h3>What this does not cover</h3>
<ul>
{% for item in card.not_covered %}
<li>{{ item }}</li>
{% endfor %}
</ul>

<h2>How it went</h2>
<div class="pairs">
{% for curve in curves %}
<figure><h3>{{ curve.title }}</h3>{{ curve.svg }}<figcaption>{% for site, colour in curve.legend %}<span class="key"><i style="border-color: {{ colour }}"></i>{{ site }}</span>{% endfor %}{% if curve.legend %}<br>{% endif %}{{ curve.note }}</figcaption></figure>
{% endfor %}
</div>
{% if not curves %}
<p class="muted">{{ "One round, the warm-up: there is no curve to draw." if records_count else "No round is finished." }}</p>
{% endif %}
<h3>Refusals</h3>
{% if refusals %}
<div class="wide">
<table>
<tr><th>site</th><th>code</th><th class="n">times</th><th>rounds</th></tr>
{% for site, code, rounds in refusals %}
<tr><td>{{ site }}</td><td><code>{{ code }}</code></td><td class="n">{{ rounds|length }}</td><td>{{ rounds[:20]|join(", ") }}{{ ", …" if rounds|length > 20 }}</td></tr>
{% endfor %}
</table>
</div>
{% else %}
<p>No site refused or failed in a finished round.</p>
{% endif %}

{% if evaluation is not none %}
<h2>Test of the generator</h2>
<p>{{ evaluation.note }} The figures are exact: computed on these patients without noise.</p>
<table>
<tr><td>accuracy of the classifier on their images</td><td class="n">{{ evaluation.tstr_accuracy|percent }}</td></tr>
<tr><td>area under its ROC curve</td><td class="n">{% if evaluation.tstr_auc is none %}for two classes only{% else %}{{ evaluation.tstr_auc|figure }}{% endif %}</td></tr>
<tr><td>synthetic images it learned from</td><td class="n">{{ "{:,}".format(evaluation.synthetic_images) }}</td></tr>
<tr><td>real images it was tested on</td><td class="n">{{ "{:,}".format(evaluation.held_out_images) }} of {{ "{:,}".format(evaluation.held_out_patients) }} patients</td></tr>
<tr><td>repetitions, averaged</td><td class="n">{{ evaluation.repeats }}</td></tr>
</table>
{% endif %}

<h2>Settings</h2>
<div class="columns">
{% for section, values in settings %}
<div><h3>[{{ section }}]</h3>
<table class="settings">
{% for key, value in values %}
<tr><td><code>{{ key }}</code></td><td>{% if value is string %}{{ value or "(empty)" }}{% elif value is boolean %}{{ "yes" if value else "no" }}{% elif value is iterable %}{{ value|join(", ") }}{% else %}{{ value }}{% endif %}</td></tr>
{% endfor %}
</table></div>
{% endfor %}
</div>

<h2>Files in this folder</h2>
<table>
<tr><th>name</th><th class="n">kB</th><th>what it is</th></tr>
{% for file, size, what in files %}
<tr><td><code>{{ file }}</code></td><td class="n">{{ "{:,.1f}".format(size / 1000) }}</td><td>{{ what }}</td></tr>
{% endfor %}
</table>
<p class="muted">Run {{ info.run_id }}. Digest of the shared settings <code>{{ info.config_digest }}</code>. SHA-256 of generator.safetensors <code>{{ info.sha256 }}</code>.</p>
</body>
</html>
"""
