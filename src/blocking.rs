//! Runs work that may block in the plugin process: files, locks, `statfs`, starting a process. On a network file system whose
//! server is gone, each of them may block forever. Such work runs on tokio's blocking threads and never on a worker thread: the
//! few workers serve every request.

use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::timeout;

/// The maximum number of blocking threads of the runtime that serves requests. Further work waits for a free one.
pub const THREADS: usize = 512;

/// The maximum number of blocking threads that starts may occupy together. Starts that hang leave the other half for everything
/// else.
const STARTS: usize = THREADS / 2;

static STARTING: Semaphore = Semaphore::const_new(STARTS);

/// The number of blocking threads that starts occupy as long as none of them takes long. Each thread that has worked keeps some hundred
/// small blocks of free memory until it ends, so after many starts at once the plugin would stay larger by a third.
const USUAL_STARTS: usize = 16;

/// How long a step of a start waits for one of the usual threads before it takes another one.
const PATIENCE: Duration = Duration::from_secs(1);

static STARTING_AS_USUAL: Semaphore = Semaphore::const_new(USUAL_STARTS);

/// Runs `work` on a blocking thread and waits for it. A panic in `work` is resumed in the caller. `work` continues if the caller
/// is dropped.
pub async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down, and this call ends with it.
            Err(_) => std::future::pending().await,
        },
    }
}

/// Like [`run`], for a step of a start. Waits while too many steps of other starts are running.
pub async fn run_start<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    // The semaphores are never closed, so only waiting for a usual thread can fail. The permits move into the work, which occupies its
    // thread even if the caller is gone.
    let usual = timeout(PATIENCE, STARTING_AS_USUAL.acquire()).await;
    let permit = STARTING.acquire().await;
    run(move || {
        let _permits = (usual, permit);
        work()
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .max_blocking_threads(THREADS)
            .build()
            .unwrap()
    }

    #[test]
    fn a_panic_is_returned_to_the_caller() {
        let runtime = runtime();
        let call = runtime.spawn(run(|| panic!("on purpose")));
        assert!(runtime.block_on(call).unwrap_err().is_panic());
    }

    #[test]
    fn hanging_starts_leave_threads_for_other_calls() {
        let runtime = runtime();
        let (release, released) = mpsc::channel::<()>();
        let released = std::sync::Arc::new(std::sync::Mutex::new(released));
        let hung: Vec<_> = (0..2 * STARTS)
            .map(|_| {
                let released = std::sync::Arc::clone(&released);
                runtime.spawn(run_start(move || released.lock().unwrap().recv().is_err()))
            })
            .collect();
        runtime.block_on(async {
            while STARTING_AS_USUAL.available_permits() > 0 {
                tokio::task::yield_now().await;
            }
            assert_eq!(STARTING.available_permits(), STARTS - USUAL_STARTS);
            while STARTING.available_permits() > 0 {
                tokio::time::advance(PATIENCE).await;
            }
            assert_eq!(run(|| 1).await, 1);
            drop(release);
            for start in hung {
                assert!(start.await.unwrap());
            }
        });
    }
}
