"""Chat templates that mean harm: an error; never execution, a hang, or all of memory. Those that mean well give what Jinja gives."""

import json
import resource
import threading
import time

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxinfer.chat import ChatTemplate
from jaxinfer.errors import ChatTemplateError
from jaxinfer.sandbox.budget import MAX_BITS
from jaxinfer.sandbox.environment import MAX_SOURCE

MESSAGES = [{"role": "user", "content": "Hi there"}]
SECONDS = 60  # what takes a second when nothing else runs must not count as a hang when much does
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def rendered(template: str, messages=MESSAGES) -> str:
    chat = ChatTemplate(template, {"bos_token": "<s>"})
    return chat.render(chat.checked(messages))


# --- templates that would never end, or take all of memory

DOUBLED = "{% set x = X %}" * 60
FOREVER = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "loops that print": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "loops with a condition": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}x{% endfor %}{% endfor %}",
    "loops in a block": "{% set x %}{% for a in range(99999) %}{% for b in range(99999) %}xyz{% endfor %}{% endfor %}"
    "{% endset %}",
    "a long condition": "{% for a in range(99999) %}{% for b in range(99999) %}{% if "
    + " and ".join(["a"] * 60)
    + " %}{% endif %}"
    "{% endfor %}{% endfor %}",
    "kept lists": "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = [a, b] %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "macros that call themselves": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "callers": "{% macro a() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call a() %}" * 40 + "x" + "{% endcall %}" * 40,
    "blocks": "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "recursive loops": "{% for i in [1, 2, 3] recursive %}{{ loop([1, 2, 3]) }}{% endfor %}",
    "comparisons": "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(80) %}{% set n.a = [n.a, n.a] %}"
    "{% set n.b = [n.b, n.b] %}"
    "{% endfor %}{{ n.a == n.b }}",
    "hashes": "{% set n = namespace(a=(1,)) %}{% for i in range(80) %}{% set n.a = (n.a, n.a) %}{% endfor %}"
    "{{ {n.a: 1} | length }}",
    "searches": "{% set t = 'ab' * 400000 %}{% for i in range(99999) %}{% if 'x' in t %}{% endif %}{% endfor %}",
    "slices": "{% set t = 'ab' * 400000 %}{% for i in range(99999) %}{% set u = t[1:] %}{% endfor %}",
    "filters": "{% set t = 'ab' * 400000 %}{% for i in range(99999) %}{% set u = t | upper %}{% endfor %}",
    "methods": "{% set t = 'ab' * 400000 %}{% for i in range(99999) %}{% set u = t.upper() %}{% endfor %}",
    "sorting": "{{ (range(99999) | map(attribute='x', default='b' * 900000) | sort) | length }}",
}
ENORMOUS = {
    "text times a number": "{{ 'a' * 10**10 }}",
    "a number times text": "{{ 10**10 * 'a' }}",
    "a list times a number": "{{ ([1] * 10**9) | length }}",
    "powers": "{{ 9 ** 9 ** 9 ** 9 ** 9 }}",
    "products": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubled text": "{% set x = 'abcdefgh' %}" + DOUBLED.replace("X", "x + x"),
    "doubled by ~": "{% set x = 'abcdefgh' %}" + DOUBLED.replace("X", "x ~ x"),
    "doubled lists": "{% set x = [1] %}" + DOUBLED.replace("X", "x + x"),
    "nested lists": "{% set x = [1] %}" + DOUBLED.replace("X", "[x, x]") + "{{ x }}",
    "nested mappings": "{% set x = {} %}" + DOUBLED.replace("X", "{'a': x, 'b': x}") + "{{ x | tojson }}",
    "nested by dict()": "{% set x = {} %}" + DOUBLED.replace("X", "dict(a=x, b=x)") + "{{ x }}",
    "nested by arguments": "{% macro m(n) %}{% if n %}{{ m(n - 1, varargs, varargs) }}{% endif %}{% endmacro %}{{ m(80) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "center, as a method": "{{ 'a'.center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**9) | length }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "indent": "{{ ('a\n' * 10000) | indent(10**6) }}",
    "indent by text": "{{ ('a\n' * 10000) | indent('x' * 100000) }}",
    "join": "{{ (['a'] * 10000) | join('b' * 100000) }}",
    "join, as a method": "{{ ('b' * 100000).join(['a'] * 10000) }}",
    "join of what never was a list": "{{ ','.join(range(99999) | map(attribute='x', default='b' * 900000)) }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "replace, as a method": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "a wide %": "{{ '%1000000000d' % 1 }}",
    "a computed width": "{{ '%*d' % (1000000000, 1) }}",
    "a long fraction": "{{ '%.1000000000f' % 1 }}",
    "one value many times": "{{ ('%(a)s' * 10000) % {'a': 'x' * 100000} }}",
    "format": "{{ '%(a)01000000000d' | format(a=1) }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "str.format of a format": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "str.format many times": "{{ ('{0}' * 10000).format('x' * 100000) }}",
    "batch": "{{ [1] | batch(10**10, 'x') | list }}",
    "slice": "{{ [1] | slice(10**10) | list }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "JSON indent": "{{ [1] | tojson(indent=10**10) }}",
    "JSON separators": "{{ ([1] * 10000) | tojson(separators=('x' * 100000, ':')) }}",
    "sums of lists": "{{ ([[1] * 10] * 5000) | sum(start=[]) | length }}",
    "the time": "{{ strftime_now('%c' * 1000) }}",
    "lorem ipsum": "{{ lipsum(n=10**9) }}",
    "printing in a macro": "{% macro f() %}"
    + "{{ x }}" * 3000
    + "{% endmacro %}{% set x = ['abcdefgh' * 100] * 900 %}{{ f() }}",
    "variables": "".join(f"{{% set a{i} = 'x' * 900000 %}}" for i in range(2000)),
    "a large template": "x" * (MAX_SOURCE + 1),
    "brackets": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "braces": "{" * 60000,
    "operators": "{{ 1" + "+1" * 20000 + " }}",
    "attributes": "{{ a" + ".b" * 20000 + " }}",
    "statements in statements": "{% for i in [1] %}" * 200 + "{% endfor %}" * 200,
    "choices": "{% if 0 %}" + "{% elif 0 %}" * 5000 + "{% endif %}",
    "digits": "{{ " + "1" * 60000 + " }}",
}


HARMLESS = ("choices",)  # Python 3.13 compiles it at once


@pytest.mark.parametrize("name", [*FOREVER, *ENORMOUS])
def test_a_template_ends_with_an_error_in_any_thread(name):
    before, found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []

    def attack():
        start = time.monotonic()
        try:
            rendered((FOREVER | ENORMOUS)[name])
            said = ""
        except ChatTemplateError as error:
            said = str(error)
        found.append((time.monotonic() - start, said))

    thread = threading.Thread(target=attack, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert found, "it did not end"
    assert len(found[0][1]) < 1000 and (found[0][1] or name in HARMLESS)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}!{{ messages['__class__'].__mro__ }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.x }}",
        "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
        "{{ (messages | map('upper')).gi_frame.f_globals }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ '{a}'.format_map({'a': 1}) }}",
        "{{ ''.encode().decode() }}",
        "{{ (5).to_bytes(8) }}",
        "{{ {}.fromkeys([1]) }}",
        "{{ dict.mro() }}",
        "{{ messages | attr('append') }}",
        "{{ messages | map('attr', '__class__') | list }}",
        "{% include 'secret.txt' %}",
        "{% import 'os' as os %}",
        "{% extends 'base' %}",
        "{{ namespace(__init__=1).__init__.x }}",
        "{{ messages.pop() }}",
        "{{ messages[0].update(role='x') }}",
        "{% autoescape true %}{{ '<' }}{% endautoescape %}",
        "{{ open('/etc/passwd').read() }}",
        "{{ 'a<b>' | striptags }}",
        "{% print(lipsum.__globals__['os'].popen('id').read()) %}",
    ],
)
def test_a_template_reaches_nothing_but_its_values(template):
    with pytest.raises(ChatTemplateError):
        rendered(template)


def test_an_error_is_not_as_long_as_what_it_is_about():
    with pytest.raises(ChatTemplateError) as error:
        rendered("{{ raise_exception('x' * 10000) }}")
    assert len(str(error.value)) < 700 and "..." in str(error.value)


def test_a_rendering_leaves_nothing_behind():
    for _ in range(3):
        with pytest.raises(ChatTemplateError, match="without end"):
            rendered(FOREVER["loops that print"])
        assert rendered("{{ messages[0].content }}") == "Hi there"


# --- templates that mean well are not hindered

HONEST = [
    CHATML,
    "{%- for m in messages -%}\n  {{ loop.index }}/{{ loop.length }} {{ m.role | upper }}: {{ m.content | trim }}"
    "{{ '' if loop.last else ', ' }}\n{%- endfor %}",
    "{% set ns = namespace(system='', seen=[]) %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = ns.system + m.content %}"
    "{% else %}{% set ns.seen = ns.seen + [m.role] %}{% endif %}{% endfor %}{{ ns.system }}|{{ ns.seen }}"
    "|{{ ns.seen | length }}",
    "{% macro turn(m, n=2) -%}[{{ m.role }}]{{ m['content'] * n }}{%- endmacro %}{% for m in messages %}{{ turn(m) }}"
    "{{ turn(m, n=1) }}{% endfor %}",
    "{{ messages[1:] | map(attribute='role') | join(',') }}{{ messages[::-1] | map(attribute='content') | list }}"
    "{{ messages[-1].content[2:4] }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ messages | rejectattr('role', 'in', ['user']) | map(attribute='role') | list }}",
    "{% if messages | selectattr('role', 'equalto', 'nobody') %}always{% endif %}"
    "{{ (messages | map(attribute='role') | list) == [] }}",
    "{% set text = messages[-1].content %}{{ text.split(' ')[0].strip() }}{{ text.startswith('x') }}{{ 'x' in text }}"
    "{{ text | replace('o', '0') }}{{ text.upper() ~ 1 }}",
    "{{ {'a': 1, 'b': [1, 2.5, none, true, 'é']} | tojson }}{{ messages | tojson(indent=2) }}"
    "{% for k, v in {'x': 1, 'y': 2}.items() %}{{ k }}={{ v }};{% endfor %}",
    "{{ [3, 1, 2] | sort }}{{ ['b', 'a', 'B'] | unique | list }}{{ [1, 2] | sum }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}"
    "{{ -3 | abs }}{{ 1.239 | round(2) }}{{ '%03d|%s' % (7, 'x') }}",
    "{{ '{} {x}'.format(1, x=2) }}{{ '%s-%s' | format('a', 'b') }}{{ 'a\nb' | indent(2) }}{{ 'abc' | center(9) }}"
    "{{ 'a<b' | e }}{{ 'x' | safe + '<' }}",
    "{% for group in messages | groupby('role') %}{{ group.grouper }}:{{ group.list | length }} {% endfor %}"
    "{{ messages | batch(2) | list | length }}",
    "{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}",
    "{% set x %}{{ messages[0].content }}{% endset %}{{ x | length }}{% filter upper %}abc{% endfilter %}{% with y = 2 %}"
    "{{ y }}{% endwith %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% if loop.index > 2 %}{% break %}"
    "{% endif %}{% endfor %}",
    "{% macro wrap() %}<{{ caller() }}>{% endmacro %}{% call wrap() %}{{ messages | first | length }}{% endcall %}"
    "{% block b %}b{% endblock %}{{ self.b() }}",
    "{{ undefined_name }}{{ messages[0].nothing is defined }}{{ messages[0].get('nothing', 'd') }}"
    "{{ nothing | default('e') }}{{ bos_token }}{{ loop is defined }}",
    "{% set c = cycler('a', 'b') %}{% set j = joiner(', ') %}{% for m in messages %}{{ j() }}{{ c.next() }}"
    "{{ loop.cycle('x', 'y') }}{% endfor %}{{ dict(a=1) }}",
]


@pytest.mark.parametrize("template", HONEST)
def test_templates_give_what_jinja_gives(template):
    messages = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "What is <that> & why?"},
        {"role": "assistant", "content": "Nothing, to be honest."},
        {"role": "user", "content": "foo bar"},
    ]
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    plain.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    expected = plain.from_string(template).render(messages=messages, bos_token="<s>", add_generation_prompt=True)
    assert rendered(template, messages).replace("<namespace>", "") == expected.replace(
        "x&lt;", "x<"
    )  # text has no markup to keep safe


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{% for m in messages[::-1] %}{% if m.content is string and loop.index0 < messages | length %}{{ m.role }}"
        "{% endif %}{% endfor %}",
        "{% for m in messages %}{% for later in messages[loop.index0 + 1:] %}{% if later.role == 'tool' %}t{% else %}"
        "{% break %}{% endif %}{% endfor %}"
        "{{ m.content | trim }}{% endfor %}",
    ],
)
def test_long_conversations_are_within_the_budget(template):
    many = [{"role": ("user", "assistant")[i % 2], "content": f"message {i}"} for i in range(2000)]
    assert len(rendered(template, many)) > 5000
    assert rendered("{{ messages[0].content | trim | replace('\r', '') }}", [{"role": "user", "content": "word " * 200_000}])


def test_numbers_have_a_limit_that_arithmetic_stays_under():
    assert rendered("{{ (2 ** 4000) | string | length }}") == "1205"
    with pytest.raises(ChatTemplateError, match=f"{MAX_BITS:,} are possible"):
        rendered("{{ 2 ** 20000 > 1 }}")
