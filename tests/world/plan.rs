//! What a seed draws: rooms, participants, what each of them does and when, and the conditions on
//! every link.

use std::time::Duration;

use throng::engine::publisher::Pacing;
use throng::seeded::Seeded;
use throng::sfu::SendMode;
use throng::units::Time;

use crate::common::link::Conditions;

/// Time in which participants join, act and leave. At its end the publishers stop.
pub const ACTIVE: Duration = Duration::from_millis(6_000);
/// Time after [`ACTIVE`] in which every link is perfect, so that what is missing may still be
/// repaired.
pub const DRAIN: Duration = Duration::from_millis(2_500);
/// Time after which a publisher's first connection, and what depends on it, should be there,
/// whatever the links are like.
const SETTLED: Duration = Duration::from_millis(1_500);

#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub routers: usize,
    pub shards: usize,
    pub send: SendMode,
    pub rooms: usize,
    /// One person for each session. A participant that comes back is another person with the same
    /// identity.
    pub people: Vec<Person>,
}

#[derive(Clone, Debug)]
pub struct Person {
    pub index: u32,
    pub room: u32,
    pub identity: String,
    pub role: Role,
    pub single: bool,
    pub audio: bool,
    pub video: bool,
    pub simulcast: bool,
    pub subscribes: bool,
    pub pacing: Pacing,
    pub joins_at: Time,
    pub leaves: Option<Leave>,
    pub up: Weather,
    pub down: Weather,
    /// One-way delay of its signalling connection.
    pub signal_delay: Duration,
    pub signal_jitter: Duration,
    pub acts: Vec<(Time, Act)>,
}

/// Receiver of a participant's media.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The engine, as in every real run.
    Engine,
    /// The test's own receiver, which keeps every packet for inspection.
    Witness,
}

#[derive(Clone, Copy, Debug)]
pub struct Leave {
    pub at: Time,
    pub how: Parting,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parting {
    /// It says goodbye.
    Goodbye,
    /// It just falls silent.
    Silence,
    /// The server throws it out, although nobody had planned that.
    ThrownOut,
}

/// What a participant does between joining and leaving. Tracks are chosen by a draw from those that
/// it knows of at that time.
#[derive(Clone, Copy, Debug)]
pub enum Act {
    Subscribe {
        choice: u64,
        on: bool,
    },
    Settings {
        choice: u64,
        settings: Settings,
    },
    Mute {
        video: bool,
        on: bool,
    },
    /// Its signalling connection breaks. It resumes after this time.
    LoseSignal {
        away: Duration,
    },
}

#[derive(Clone, Copy, Debug)]
pub enum Settings {
    Disabled,
    /// 0 is low, 1 medium, 2 high.
    Quality(u8),
    Height(u32),
}

/// Conditions of a link over time: the usual ones, and spells in which they are worse.
#[derive(Clone, Debug)]
pub struct Weather {
    pub usual: Conditions,
    /// `(from, to, conditions)`, in order.
    pub spells: Vec<(Time, Time, Conditions)>,
}

impl Weather {
    pub fn is_perfect(&self) -> bool {
        self.spells.is_empty() && is_perfect(&self.usual)
    }

    /// Returns for how long, in total, the link is worse than usual.
    pub fn worse_for(&self) -> Duration {
        self.spells
            .iter()
            .map(|(from, to, _)| to.since(*from))
            .sum()
    }

    pub fn at(&self, now: Time) -> Conditions {
        let spell = self
            .spells
            .iter()
            .find(|(from, to, _)| (*from..*to).contains(&now));
        spell.map_or(self.usual, |(.., conditions)| *conditions)
    }

    /// Returns the conditions of the link once the drain has begun.
    pub fn calm(&self) -> Conditions {
        Conditions {
            delay: self.usual.delay,
            ..Conditions::default()
        }
    }
}

fn is_perfect(conditions: &Conditions) -> bool {
    conditions.loss == 0.0 && conditions.duplication == 0.0 && conditions.jitter.is_zero()
}

impl Plan {
    pub fn draw(seed: u64) -> Plan {
        let mut chance = Seeded::new(seed);
        // Every fifth world has perfect links and nothing but joins, so every frame must arrive in
        // it.
        let calm = seed.is_multiple_of(5);
        let rooms = 1 + chance.below(3) as usize;
        let mut plan = Plan {
            seed,
            routers: 1 + usize::from(rooms > 1 && chance.chance(50)),
            shards: 1 + chance.below(3) as usize,
            send: if chance.chance(50) {
                SendMode::Plain
            } else {
                SendMode::Gso
            },
            rooms,
            people: Vec::new(),
        };
        for room in 0..rooms as u32 {
            let publishers = 1 + chance.below(2);
            let audience = 1 + chance.below(if rooms == 1 { 4 } else { 2 });
            let simulcast = chance.chance(60);
            for _ in 0..publishers {
                plan.add_publisher(room, simulcast, calm, &mut chance);
            }
            for _ in 0..audience {
                plan.add_subscriber(room, Role::Engine, calm, &mut chance);
            }
            plan.add_subscriber(room, Role::Witness, calm, &mut chance);
        }
        plan.throw_out(calm);
        plan
    }

    /// Throws out some participants that were to stay. It has a draw of its own, so that worlds
    /// without such participants stay what they were.
    fn throw_out(&mut self, calm: bool) {
        let mut chance = Seeded::new(!self.seed);
        let identities: Vec<String> = self.people.iter().map(|one| one.identity.clone()).collect();
        let is_alone =
            |identity: &str| identities.iter().filter(|one| *one == identity).count() == 1;
        for person in &mut self.people {
            let stays = person.leaves.is_none() && is_alone(&person.identity);
            if !calm && stays && person.role == Role::Engine && chance.chance(20) {
                let at = moment(&mut chance, 2_000, 5_500).max(person.joins_at + SETTLED);
                let how = Parting::ThrownOut;
                person.leaves = Some(Leave { at, how });
            }
        }
    }

    fn add_publisher(&mut self, room: u32, simulcast: bool, calm: bool, chance: &mut Seeded) {
        let mut person = self.person(room, Role::Engine, calm, chance);
        person.video = chance.chance(75);
        person.audio = !person.video || chance.chance(75);
        person.simulcast = simulcast;
        person.subscribes = chance.chance(60);
        if chance.chance(50) {
            person.pacing = Pacing::Burst;
        }
        if !calm && chance.chance(30) {
            let video = person.video && chance.chance(60);
            let at = moment(chance, 2_000, 4_000);
            person.acts.push((at, Act::Mute { video, on: true }));
            if chance.chance(70) {
                let back = at + Duration::from_millis(300 + chance.below(1_500));
                person.acts.push((back, Act::Mute { video, on: false }));
            }
        }
        draw_loss_of_signal(&mut person, calm, chance);
        self.add(person, calm, chance);
    }

    fn add_subscriber(&mut self, room: u32, role: Role, calm: bool, chance: &mut Seeded) {
        let mut person = self.person(room, role, calm, chance);
        // On a perfect link, a witness sees all that the router sent.
        if role == Role::Witness && chance.chance(60) {
            person.down = Weather {
                usual: Conditions {
                    delay: person.down.usual.delay,
                    ..Conditions::default()
                },
                spells: Vec::new(),
            };
        }
        if !calm {
            for _ in 0..chance.below(8) {
                let act = draw_act(chance);
                person.acts.push((moment(chance, 1_000, 5_500), act));
            }
        }
        draw_loss_of_signal(&mut person, calm, chance);
        self.add(person, calm, chance);
    }

    fn person(&self, room: u32, role: Role, calm: bool, chance: &mut Seeded) -> Person {
        let index = self.people.len() as u32;
        let latest_join_ms = if chance.chance(70) { 300 } else { 3_000 };
        Person {
            index,
            room,
            identity: format!("person-{index}"),
            role,
            single: chance.chance(50),
            audio: false,
            video: false,
            simulcast: false,
            subscribes: true,
            pacing: Pacing::Paced,
            joins_at: moment(chance, 1, latest_join_ms),
            leaves: None,
            up: draw_weather(calm, chance),
            down: draw_weather(calm, chance),
            signal_delay: Duration::from_micros(200 + chance.below(30_000)),
            signal_jitter: Duration::from_micros(chance.below(20_000)),
            acts: Vec::new(),
        }
    }

    /// Adds a participant. Some leave before the end, and some of these come back, either after
    /// they have left or while the server still has them.
    fn add(&mut self, mut person: Person, calm: bool, chance: &mut Seeded) {
        if calm || !chance.chance(35) {
            return self.people.push(person);
        }
        let at = moment(chance, 2_500, 5_500).max(person.joins_at + SETTLED);
        let how = if chance.chance(70) {
            Parting::Goodbye
        } else {
            Parting::Silence
        };
        let mut again = person.clone();
        let comes_back = chance.chance(50) && at < Time::from_millis(4_500);
        // Some do not leave at all: the server ends their session when another one takes its place.
        let is_replaced = comes_back && chance.chance(40);
        person.leaves = (!is_replaced).then_some(Leave { at, how });
        self.people.push(person);
        if comes_back {
            again.index = self.people.len() as u32;
            // A participant that says goodbye may be in again before its goodbye is heard.
            again.joins_at = at + Duration::from_millis(chance.below(400));
            again.single = chance.chance(50);
            again
                .acts
                .retain(|(act_at, _)| *act_at > again.joins_at + SETTLED);
            self.people.push(again);
        }
    }
}

fn moment(chance: &mut Seeded, from_ms: u64, to_ms: u64) -> Time {
    Time::from_micros(from_ms * 1_000 + chance.below((to_ms - from_ms) * 1_000))
}

/// Draws a loss of the signalling connection. It does not come before the participant is in,
/// because one that loses its signalling earlier joins anew.
fn draw_loss_of_signal(person: &mut Person, calm: bool, chance: &mut Seeded) {
    if !calm && chance.chance(20) {
        let at = moment(chance, 1_500, 4_500).max(person.joins_at + SETTLED);
        let away = Duration::from_millis(50 + chance.below(1_000));
        person.acts.push((at, Act::LoseSignal { away }));
    }
    person.acts.sort_by_key(|(at, _)| *at);
}

fn draw_act(chance: &mut Seeded) -> Act {
    let choice = chance.draw();
    match chance.below(6) {
        0 => Act::Subscribe { choice, on: false },
        1 => Act::Subscribe { choice, on: true },
        2 => Act::Settings {
            choice,
            settings: Settings::Disabled,
        },
        3 => Act::Settings {
            choice,
            settings: Settings::Height([60, 90, 135, 180, 720][chance.below(5) as usize]),
        },
        _ => Act::Settings {
            choice,
            settings: Settings::Quality(chance.below(3) as u8),
        },
    }
}

fn draw_weather(calm: bool, chance: &mut Seeded) -> Weather {
    let delay = Duration::from_micros(100 + chance.below(40_000));
    let kind = if calm { 0 } else { chance.below(10) };
    let (loss, duplication, jitter_ms) = match kind {
        0..=2 => (0.0, 0.0, 0),
        3..=5 => (0.002, 0.0, 3),
        6..=8 => (0.01 + chance.unit() * 0.03, 0.005, 2 + chance.below(10)),
        _ => (0.05 + chance.unit() * 0.12, 0.03, 5 + chance.below(30)),
    };
    let usual = Conditions {
        loss,
        duplication,
        delay,
        jitter: Duration::from_millis(jitter_ms),
    };
    Weather {
        usual,
        spells: if kind < 3 {
            Vec::new()
        } else {
            draw_spells(usual, chance)
        },
    }
}

/// Draws bursts of loss, spikes of delay, and now and then a time in which the link is dead.
fn draw_spells(usual: Conditions, chance: &mut Seeded) -> Vec<(Time, Time, Conditions)> {
    let mut spells: Vec<(Time, Time, Conditions)> = (0..chance.below(4))
        .map(|_| {
            let from = moment(chance, 500, 5_500);
            let (length_ms, conditions) = match chance.below(5) {
                0 => (500 + chance.below(2_000), Conditions { loss: 1.0, ..usual }),
                1 => {
                    let delay = usual.delay + Duration::from_millis(50 + chance.below(200));
                    (100 + chance.below(400), Conditions { delay, ..usual })
                }
                _ => {
                    let loss = 0.3 + chance.unit() * 0.7;
                    (20 + chance.below(150), Conditions { loss, ..usual })
                }
            };
            (from, from + Duration::from_millis(length_ms), conditions)
        })
        .collect();
    spells.sort_by_key(|(from, ..)| *from);
    spells
}
