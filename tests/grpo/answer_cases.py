"""Which predictions the answer matcher accepts and refuses for a gold answer, rule by rule."""

from decimal import Decimal
from fractions import Fraction

NBSP, MINUS = "\u00a0", "\u2212"


def table(domain, text):
    """Turn lines `gold => predicted | predicted` into (gold, predicted, domain) cases."""
    lines = (line.partition(" => ") for line in text.strip("\n").splitlines())
    return [(gold, predicted, domain) for gold, _, rest in lines for predicted in rest.split(" | ")]


ACCEPT = [
    # rule 1: gold is text or a number
    (72, "72", "math"), (72.0, "72", "math"), (0.5, "1/2", "math"), (-3, f"{MINUS}3", "math"),
    (Fraction(1, 3), "1/3", "math"), (Decimal("2.50"), "2.5", "math"), (72, 72, "math"),
    (True, "True", "code"), (10**30, "1" + "0" * 30, "math"), (5, "5", "code"),
    (2.5, "2.5", "code"), (1e22, "10000000000000000000000", "math"),
    (10**350, str(10**350), "math"),
    # rule 2: white space, one full stop, one layer of marks
    ("72", " 72\n", "math"), ("72", f"{NBSP}72{NBSP}", "math"), ("72", "\ufeff72\u200b", "math"),
    ("72", "```\n72\n```", "math"), ("[1, 2]", "```python\n[1, 2]\n```", "code"),
    ("72", "72\u202f", "math"), ("72", "\t72.\r\n", "math"),
    *table("math", r"""
72 => 72. | $72$ | $$72$$ | \(72\) | \[72\] | \boxed{72} | \text{72} | **72** | __72__ | `72`
72 => $\boxed{72}$ | $\boxed{72}$. | **$72$**. | $\$72$
$72$ => 72
\boxed{72} => 72
72. => 72
east => \text{east} | **East**. | \textbf{east}
\frac{1}{2} => $\frac{1}{2}$
"""),
    # rule 4: numbers
    ("-5", f"{MINUS}5", "math"), ("1.5e-3", f"1.5×10^{{{MINUS}3}}", "math"),
    ("1234567", "1\u202f234\u202f567", "math"), ("1234", f"1{NBSP}234", "math"),
    *table("math", r"""
1234 => 1,234
1,234 => 1234
1234567.5 => 1,234,567.5
10000 => 10{,}000 | 10\,000 | 10,\!000
0.5 => .5 | 0.50
5 => 5.0 | +5 | 05
-5 => - 5
3/4 => 0.75
0.75 => 3/4
3/4 => 6/8 | 3 / 4
-3/4 => -0.75
3/4 => \frac{3}{4} | \dfrac{3}{4} | \tfrac34
-3/4 => -\frac{3}{4} | \frac{-3}{4} | 3/-4
5/2 => 2 1/2
2.5 => 2\frac{1}{2} | 2\frac12
-2.5 => -2 1/2
1500 => 1.5e3 | 1.5E+3 | 1.5 \times 10^{3} | 1.5 × 10^3 | 1.5*10**3 | 1.5 \cdot 10^3
0.0015 => 1.5e-3
1/3 => 0.3333333333333
0.1 => 0.1000000000000001
1,000,000 => 1e6
0 => -0
2 => 4/2
"""),
    # rule 5: currency signs, units, percent
    *table("math", r"""
75% => 75 | 75% | 0.75 | 3/4 | 75 % | 75\% | 75 percent | 75 per cent
75 => 75%
0.75 => 75%
-5% => -0.05
12.5% => 1/8
5 => $5 | \$5
$5 => 5 | 5 dollars | 5 USD | US$5 | USD 5
5 dollars => $5.00
-$5 => -5
$-5 => -5
-$5 => $-5
€5 => 5 euros
£5 => 5 pounds
5 lb => 5 pounds
75 cents => 75¢
1,250 => $1,250
$1,250.00 => 1250
$5 => $5 per hour
18 => 18 eggs
18 eggs => 18 | 18 egg
12 cookies => 12 cookie
4 boxes => 4 box
6 berries => 6 berry
5 m => 5 meters | 5 metre | 5m | 5\text{ m} | 5 \, \text{m}
5 km => 5 KM
5 km/h => 5 kilometers per hour
60 mph => 60 miles per hour | 60 mi/h
10 m/s => 10 meters/second
25 cm^2 => 25 square centimeters
25 cm² => 25 \text{ cm}^2
25 cm^{2} => 25 sq cm
25 m^3 => 25 cubic meters | 25 meters cubed
90° => 90 degrees | 90^\circ
90 => 90^{\circ}
20°C => 20 degrees Celsius | 20 °C
3 hours => 3 h | 3 hrs
45 minutes => 45 min
2 L => 2 liters
250 mL => 250 ml
6 feet => 6 ft
10 inches => 10 in.
7 years => 7 years
3 people => 3 persons
2 1/2 cups => 2.5 cups
1/2 cup => 0.5
9 T-shirts => 9
7 pm => 7 PM
"""),
    # rule 6: x = v
    *table("math", r"""
5 => x = 5 | x=5
x = 5 => 5 | x = 5.0 | $x = 5$
5 => x = \boxed{5} | \theta = 5 | x_1 = 5 | x_{12} = 5 | Total = $5$ | m = 5 kg
\sqrt{2} => x = \sqrt{2}
y = 2x + 3 => 2x+3
x = 1/2 => x = 0.5
"""),
    ("[1, 2]", "result = [1, 2]", "code"),
    # rule 7: choice letters
    *table("science", r"""
B => B | b | (B) | B) | B. | B: | (b) | **B** | \boxed{B} | $\textbf{(B)}$ | \text{B}.
B => B) photosynthesis | B. photosynthesis | B: photosynthesis | (B) photosynthesis
B => (B). photosynthesis | **B) photosynthesis** | B) vitamin C | B) iodine (I) | B) H(g)
B => B) A plant needs light. | B)photosynthesis
(B) => B
B) => B
A => A. an animal cell
D => (D)
b => B
B) photosynthesis => B | (B) | B. Photosynthesis | photosynthesis
(B) photosynthesis => B: photosynthesis
photosynthesis => B) photosynthesis
9.8 => C) 9.8
B) 10 m => B) 10 meters
C) H:O:H => H:O:H | C
"""),
    *table("math", "B => (B)\nB => B) 12\nC => c\nE => **E**"),
    # rule 8: code literals
    *table("code", r"""
[1, 2] => [1,2] | [ 1, 2 ] | `[1, 2]` | [1, 2]. | $[1, 2]$
[1, 2,] => [1, 2]
'abc' => "abc"
'a.b' => 'a.b'
"it's" => 'it\'s'
(1, 2) => (1,2) | 1, 2
{1, 2} => {2, 1}
{'a': 1, 'b': 2} => {'b': 2, 'a': 1}
{'a': [1, {2}]} => {"a": [1, {2}]}
True => True
None => None | `None`
5 => 5 | 0x5
1000 => 1_000
-5 => - 5
5.0 => 5.00
0.3 => 0.30000000000000004
[0.5] => [.5]
1e3 => 1000.0
b'x' => b"x"
[] => []
'#1' => "#1"
set() => set()
{(1, 2): 3} => {(1, 2): 3}
1+2j => 1+2j
"""),
    # rule 9: words and program output
    ("New  York", "new\nyork", "math"), ("hello  world", "hello world", "code"),
    *table("science", r"""
photosynthesis => Photosynthesis
the Sun => the sun
New York => NEW YORK
yes => Yes.
No => NO | no
up => Up
Pb => Pb
red, green and blue => Red, green and blue
World War 2 => world war 2
CO2 => CO2
NaCl => NaCl
Anglo-Saxon => anglo-saxon
"""),
    *table("code", "Hello World => Hello World\nf( x ) => f(x)\n1 2 3 => 1 2 3"),
    # rule 10: the rest without white space
    *table("math", r"""
x^2 + 1 => x^2+1
(1, 2) => (1,2)
1, 2, 3 => 1,2,3
{1, 2} => {1,2}
\sqrt{2} => \sqrt{2}
2\pi => 2 \pi
2 + 3 => 2+3
x < 5 => x<5
3:4 => 3 : 4
x => x
1e5000 => 1e5000
5 million => 5 million
"""),
]

REFUSE = [
    # rule 1
    ("", "", "math"), ("  ", "  ", "math"), (None, "None", "math"), (float("nan"), "nan", "math"),
    (float("inf"), "inf", "math"), ("5", None, "math"), ([5], "[5]", "math"), ({}, "{}", "code"),
    (1j, "2j", "math"), (5, "", "math"), ("5", "\u200b", "math"), (Decimal("NaN"), "NaN", "math"),
    ("\\boxed{}", "\\text{}", "math"),
    # rule 2: one layer, one full stop, and all of the text inside
    *table("math", r"""
72 => 72... | \boxed{\boxed{72}} | **72** or **73** | `72` `73` | \boxed{72}, \boxed{73}
72 => The answer is \boxed{72} | $72$ and $73$ | \boxed{72 | (72)
"""),
    ("init", "__init__", "code"),
    # rule 3: one candidate
    *table("math", r"""
72 => 72 or 73 | 72, 73 | 72 and 73 | 72; 73 | 72 73 | 72/73 | 72 (or 73) | [72] | {72} | 72 73 74
72 => 70-72 | 72, 72 | 72 = 72 | 72 apples and 3 pears | 72 or seventy | 72, which is the answer
72 => about 72 | The answer is 72 | ±72 | 72 maybe | 72 no wait | 72\text{ or }73 | 72\text{73}
12 => 1 2
1 2 => 12
1, 234 => 1,234
1,234 => 1, 234
1 2, 3 => 12, 3
1, 2 => 2, 1
"""),
    ("72", "72\n73", "math"), ("12", f"1{NBSP}2", "math"), ("[1, 2]", "[1, 2] or [2, 1]", "code"),
    # rule 4
    ("5", "٥", "math"), ("5", "５", "math"), ("5.5", "5½", "math"), ("5", "5½", "math"),
    ("5", "5²", "math"), ("-5", "–5", "math"), ("5", "5Ⅴ", "math"),
    *table("math", r"""
72 => 73 | -72
5 => --5 | -+5
-5 => --5 | -+5 | +-5
1234 => 12,34 | 1,2345 | 1,23,4 | 1_234 | ,1234
123 => 0,123
3.5 => 3,5
0.333 => 1/3
1/3 => 0.3333 | 0.33333333333
5 => 5.0000000000000001 | 4.9999999999999999 | 5/0 | 0/0
2.5 => 2-1/2 | 2 and 1/2
3.5 => 2 3/2
5 => 1.2.3
1/2/3 => 1/6
1000 => 10^3
1024 => 2^10
25 => 5^2
5 => 5^2 | 5! | 5? | 5e | 5e1000 | 9^9^9^9 | five | 0x5 | 5i
3 => 3:4
"""),
    # rule 5
    *table("math", r"""
75 => 0.75
75% => 75.0000000000001% | 7500 | 0.75% | 0.0075 | $75 | 75 apples
0.75 => 75
75 => 75% off | 75% of 4
$5 => €5 | 5 euros | 5 apples | 500 cents
$0.75 => 75 cents
£5 => 5 lb | $5
5 m => 5 s | 5 m/s | 5 m^2 | 500 cm
5 cm^2 => 5 cm^3
5 km => 5 miles
5 mW => 5 MW
20°C => 20°F | 20 K
12 apples => 12 oranges
1 hour => 60 minutes
5 => 5x | 5n | 5π | 5 \pi | 5 pi | 5\sqrt{2} | 5 million | 5 thousand | 5k | 5 dozen | 5 hundredths
5 => 5 halves | 5 plus two | 5 minus one | 5 is wrong | 5 m^ | 5/ | 5 //m | 5 a-b | $5% | $$5
"""),
    ("5", "5" + " apple" * 9, "math"), ("5", "5 " + "z" * 31, "math"), ("5", "5万", "math"),
    # rule 6
    *table("math", r"""
x = 5 => y = 5 | X = 5
5 => x == 5 | 5 = x | x = 5 or x = 6 | x = 5, y = 6 | x = y = 5 | x = 2 + 3 | 2x = 10
10 => 2x = 10
5 => x ≈ 5 | x > 5 | 2 + 3 | 3+2=5
25 => 5*5 | 5 × 5
5 => \sqrt{25} | sqrt(25) | 10 - 5
6 => 3!
5 => x =
"""),
    ("x = 5", "5", "code"), ("B", "B) cell\nC", "science"), ("B", "B) " + "z" * 201, "science"),
    # rule 7
    *table("science", r"""
B => C | C) photosynthesis | B or C | B, C | B and C | B/C | B) or C) | B) or C | B) X, C) Y
B => B. C. | B) C | (B) (C) | (B) or (C) | B: cell; C: wall | B) not C | B) no, C | B) and also D
B => BC | B C | The answer is B | Option B | It must be B. | [B] | B photosynthesis
B => B - photosynthesis
A => A plant | A plant cell | a cell
I => B
A) C => C
B) photosynthesis => B) respiration | C) photosynthesis | respiration | C
photosynthesis => B) respiration | B
9.8 => C) 9.9
B => B.5
"""),
    *table("math", "b => B\nx => X\n5 => B) 5\nB => B or C\nB => D"),
    *table("code", "B => (B)\nB => B) text\nB => b"),
    # rule 8
    *table("code", r"""
1 => True
True => 1
0 => False
1 => 1.0
1.0 => 1
1 => '1'
'1' => 1
[1] => (1,) | [True] | [1.0]
[1, 2] => (1, 2) | [2, 1] | {1, 2} | [1, 2, 3] | list((1, 2)) | [1] + [2]
{1} => {True}
{1: 'a'} => {True: 'a'}
{'a': 1} => {'a': True} | {'a': 1, 'b': 2} | {'b': 1}
'abc' => 'ABC'
'a  b' => 'a b'
'abc' => abc
abc => 'abc' | ABC
5 => 5 # or 6 | 2 + 3 | 5 items
1234 => 1,234
0.5 => 1/2
3 => len('abc') | __import__('os').getpid() | eval('3')
True => true
None => null | none
[1, 2] => [1, 2 | y == [1, 2]
'ab' => 'a' or 'b'
0.3 => 0.3001
b'x' => 'x'
set() => {}
{(1, 2): 3} => {(1, True): 3}
"""),
    ("(5)", "(5 # or 6\n)", "code"), ("'a'", "'a\x00'", "code"), ("5", "\x005", "code"),
    ("'a'", "'\ud800'", "code"),
    # rule 9
    *table("science", r"""
CO => Co
Co => CO
Rr => rr | RR
rr => Rr
NaCl => nacl
CO2 => co2
H2O => h2o
north => south | north or south | not north | northern
ice cream => icecream
red green => red, green
true => 1
"""),
    *table("code", r"""
Hello World => hello world
a b => ab
1 2 3 => 123
Hello => Hello!
"""),
    # rule 10
    *table("math", r"""
x^2 + 1 => x^2 + 2 | 1 + x^2
f(x) => F(x)
AB => Ab
5 million => 5000000
10^3 => 1000
x < 5 => x > 5
"""),
]

# A second reader's cases, by what is written; each verdict follows from the rule named.

ACCEPT += [
    # thousands groups in every style
    *table("math", r"""
1234567 => 1,234,567 | 1{,}234{,}567 | 1\,234\,567 | 1,\!234,\!567 | 1234567.0 | $1,234,567
1234567 => 1,234,567 people
12,345.67 => 12345.67 | $12,345.67 | 12\,345.67
-1,234 => -1234 | -1,234.00 | -$1,234 | $-1,234
"""),
    # zero and its sign
    *table("math", r"""
0 => −0.0 | 0/1 | -0/5 | 0e5 | 0.000 | +0 | 0% | $0 | 0 apples | 00
0.0 => 0 | -0
-0 => 0 | 0.0
"""),
    # the minus sign: ASCII and U+2212, never another dash
    *table("math", r"""
-5 => -5. | −5.0 | -05 | −10/2 | -\frac{10}{2} | \frac{-10}{2} | \frac{10}{-2} | x = -5 | −$5
-5 => -5 m
"""),
    # fractions and mixed numbers
    *table("math", r"""
2/3 => 4/6 | \frac{2}{3} | \frac23 | \dfrac{4}{6} | 0.6666666666666667 | -2/-3 | +2/3
7/2 => 3.5 | 3 1/2 | 3\frac{1}{2} | 3\frac12 | 350% | 3 1 / 2
-7/2 => -3.5 | -3 1/2 | -3\frac{1}{2}
1/2 => \frac12 cup | \frac{1}{2}cup
"""),
    # percent
    *table("math", r"""
10% => 0.1 | 10 | 10 % | 10 percent | .1 | 1/10 | 10\% | 1e1%
0.5% => 0.005 | 0.5 | .5% | 1/2% | 5e-3
100% => 1 | 100 | 1.0
"""),
    # powers of ten, exact values, and powers that must not be raised
    *table("math", r"""
1.5e3 => 1,500 | 1.5e+3 | 1.5e03 | 15e2 | 1.5 x 10^3
1e-3 => 0.001 | 1/1000 | .001 | 0.1% | 1 × 10^{-3}
1e308 => 10e307
3.0 => 3 | 3.00
0.1 => 0.10000000000001 | 1/10
3.14159 => 3.141590000000001
"""),
    # money and units
    *table("math", r"""
$7.50 => 7.5 | 7.50 dollars | $7.5 | US$7.50 | 7.50$ | USD 7.50 | 7.5 bucks
5 kg => 5kg | 5 kilograms | 5 Kg | 5
5 m/s => 5 meters per second | 5 meters/second | 5 m / s | 5 | 5 \text{ m/s} | 5\,\mathrm{m/s}
30 minutes => 30 min | 30 mins | 30
72 => 72~apples
"""),
    # a named value
    *table("math", r"""
x = 7 => 7 | x = 7.0 | $x=7$ | \boxed{x=7}
7 => x = 7 | \boxed{x = 7} | Answer = 7
"""),
    # points, sets and lists as text
    *table("math", r"""
(3, 4) => (3,4) | ( 3, 4 ) | $(3, 4)$
1, 2, 3 => 1, 2,3
"""),
    # choice letters
    *table("science", r"""
C => c | (C) | C. | C) | C: | C. oxygen | C) oxygen | (C) oxygen | C: oxygen | **C** | $C$
C => $\boxed{\text{C}}$
C) iron => C | (C) | iron | C. iron | C: Iron
(A) => A | a | A)
5 cm => B) 5 cm | (B) 5
"""),
    # code literals
    *table("code", r"""
[1, 2] => [1, 2, ] | ([1, 2]) | [ 1 , 2 ]
(1, 2) => (1, 2,) | ((1, 2))
{1, 2} => {1, 1, 2}
{'a': [1]} => {"a": [1]} | {'a': [1],}
True => `True` | True.
0 => -0 | 00 | 0x0 | 0b0
'x' => "x" | '''x'''
3.5 => 3.50 | 35e-1 | 3.5000000000000001
-1 => - 1
9**9**9 => 9 ** 9 ** 9
"""),
]

REFUSE += [
    # thousands groups in every style
    *table("math", r"""
1234567 => 1.234.567 | 1'234'567 | 1 234 567 | 1,234567 | 1234,567 | ,234,567
12,345.67 => 12.345,67 | 12,345,67
-1,234 => (1,234) | 1,234-
"""),
    # zero and its sign
    *table("math", r"""
0 => 1e-400 | 0/0 | O | 1e-10
"""),
    # the minus sign: ASCII and U+2212, never another dash
    *table("math", r"""
5 => -5 | −5 | 5− | –5
-5 => —5 | ‐5 | ˗5 | ⁻5
"""),
    # fractions and mixed numbers
    *table("math", r"""
2/3 => 0.667 | 66.7% | 2:3 | 2÷3 | ⅔ | 3/2 | \frac{3}{2} | 2/3 or so | 2/3/1 | 2/0
7/2 => 31/2 | 3 2/1 | 3-1/2 | 3½
-7/2 => 3.5
1/2 => \frac125 | \frac{1}{2}5
1/25 => \frac125 | \frac{1}{2}5
"""),
    # percent
    *table("math", r"""
10% => 1% | 100% | 0.01 | 10%% | % 10 | 10 per | 90%
0.5% => 50% | 0.05
100% => all
"""),
    # powers of ten, exact values, and powers that must not be raised
    *table("math", r"""
1.5e3 => 1.5×10³ | 1.5e3.0 | 1.5e
1e-3 => 10^-3 | 1e3
1e308 => 1e309
10 => 10**10**9 | 10^10^9 | 1e99999999999 | 9**9**9**9 | 10**1 | 10^1 | 1{0} | 1 0 | ten | X
10 => １０ | 1٠
3.0 => 3.000000000001 | 2.9999999999999999
0.1 => 0.1000000001
3.14159 => 3.14 | 3.14160
"""),
    # money and units
    *table("math", r"""
$7.50 => 750 cents | €7.50 | 7.50 euros | ¥7.50
5 kg => 5000 g | 5 lb | 5 k | 5 kg/m
5 m/s => 5 m | 5 s/m | 18 km/h | 5 m/s^2
30 minutes => 0.5 hours | half an hour | 30 m | 30'
72 => ~72 | 72 roughly | 72 possibly | 72 unless rain | 72 until noon | 72 instead of many
"""),
    # a named value
    *table("math", r"""
x = 7 => y=7 | 7=x | x=7,y=2 | x ≥ 7 | x→7 | X=7
7 => x:=7 | x==7 | 7 = 7 | x = y = 7 | x = 7 or 8 | x ≈ 7 | = 7
"""),
    # points, sets and lists as text
    *table("math", r"""
(3, 4) => 3, 4 | (4, 3) | [3, 4] | {3, 4} | (3; 4) | (3,4,5) | (3 4) | x=3, y=4
{1, 2} => {2, 1} | [1,2] | 1, 2 | \{1, 2\}
1, 2, 3 => 3, 2, 1 | 123 | 1 2 3 | 1, 2 | 1, 2, 3, 4 | (1, 2, 3)
"""),
    # choice letters
    *table("science", r"""
C => [C] | C, | C; | C! | C? | C or D | C/D | C D | CD | not C | C - oxygen | C oxygen | С | Ｃ
C => ⓒ | 3 | Option C | Answer: C | C) oxygen D) iron | C) oxygen, D) iron | (C)(D) | ((C))
C => "C"
C) iron => D) iron | C) oxygen | oxygen | D | C) irons
(A) => B
5 cm => B) 6 cm | 50 mm
"""),
    # code literals
    *table("code", r"""
[1, 2] => 1, 2 | [1, 2.0] | [1, 2][0:] | [1, 2]; | ["1", "2"] | [1, 2] [1, 2] | [*[1, 2]]
[1, 2] => [1, 2] # | [i for i in (1, 2)] | [1, 2] if True else 0
(1, 2) => [1, 2] | (1, 2.0) | ((1, 2),)
{1, 2} => {1: 2} | [1, 2] | {1, 2, 3} | set([1, 2]) | frozenset({1, 2})
{'a': [1]} => {'a': (1,)} | {'A': [1]} | {'a': [1], 'b': 2} | dict(a=[1])
True => 'True' | not False | 1 == 1 | bool(1)
0 => 0.0 | None | ''
'x' => 'X' | x | ['x'] | b'x' | 'x ' | chr(120)
3.5 => 7/2 | '3.5' | 3.51 | 3.5j
None => nan | 'None' | ()
-1 => ~0 | -1.0 | --1 | -True
9**9**9 => 1
"""),
]


REFUSE += [
    # number words and second thoughts are no units
    *table("math", r"""
5 => 5 squared | 5 cubed | 5 factorial | 5 modulo | 5 thousands | 5 millions | 5 dozens | 5 hundreds
5 => 5 lakh | 5 crore | 5 thirteen | 5 nineteen | 5 exp | 5 wrong | 5 sorry
2 dozens => 2
5 millions => 5
"""),
    # a second candidate where gold is the letter alone
    *table("science", r"""
A => A) is wrong, the answer is B | A. I also think C | A) answer: B | A) = B | A) vs B
A => A) but could be option D | A) See (B | A) yes, B? | A) → B.
"""),
]
