//! Room tokens for probers without an API key. Each prober gets short-lived tokens of its own
//! participants, and never the secret that signs them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::protocol::{Job, TokensReply, TokensRequest};
use super::state::RefusedRequest;
use crate::plan::{Part, Plan};
use crate::signal::{ApiKey, Permissions};

/// Lifetime of a token. It is asked for just before a join, and LiveKit renews it for joined
/// participants.
const LIFETIME: Duration = Duration::from_secs(600);

/// Signs tokens.
pub struct Mint {
    api_key: ApiKey,
    /// The plan that the coordinator was asked for. A job adds the rest.
    base: Plan,
    /// Plans by player, because dealing a plan takes time.
    plans: Mutex<BTreeMap<u32, Arc<Plan>>>,
}

impl Mint {
    pub fn new(api_key: ApiKey, base: Plan) -> Mint {
        Mint {
            api_key,
            base,
            plans: Mutex::new(BTreeMap::new()),
        }
    }

    /// Returns tokens for participants of the prober with this job.
    ///
    /// # Errors
    /// The prober has no such participants.
    pub fn tokens(&self, job: &Job, request: TokensRequest) -> Result<TokensReply, RefusedRequest> {
        let plan = self.plan(job)?;
        let end = request
            .from
            .checked_add(request.count)
            .filter(|end| *end <= plan.total_participants());
        let end = end.ok_or_else(|| {
            RefusedRequest::Malformed(format!(
                "this prober plays {} participants",
                plan.total_participants()
            ))
        })?;
        let token = |position: u32| {
            let participant = plan.participant(position);
            let permissions = Permissions {
                publish: participant.publishes_audio || participant.publishes_video,
                subscribe: participant.subscribes,
                publish_data: false,
                hidden: false,
            };
            let (room, identity) = (plan.room_name(participant.room), &participant.identity);
            let token = self
                .api_key
                .join_token(&room, identity, identity, permissions, LIFETIME);
            token.map(|token| token.expose().to_owned())
        };
        let tokens = (request.from..end).map(token).collect::<Result<_, _>>();
        Ok(TokensReply {
            tokens: tokens.map_err(|error| RefusedRequest::Conflict(error.to_string()))?,
            lifetime_seconds: LIFETIME.as_secs(),
        })
    }

    fn plan(&self, job: &Job) -> Result<Arc<Plan>, RefusedRequest> {
        // A plan is inserted as a whole or not at all, so a poisoned lock is harmless.
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&job.me) {
            return Ok(plan.clone());
        }
        let mut plan = self.base.clone();
        plan.follow(job.scenario.clone(), job.run_tag);
        plan.part = Some(
            Part::new(job.placement.clone(), job.me as usize, &plan.scenario)
                .map_err(|why| RefusedRequest::Conflict(why.to_string()))?,
        );
        let plan = Arc::new(plan);
        plans.insert(job.me, plan.clone());
        Ok(plan)
    }
}
