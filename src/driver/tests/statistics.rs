//! TaskStats against a mock backend: which readings are taken, by whom, and when files are closed.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

fn memory(bytes: u64) -> Option<Reading> {
    let usage = Usage {
        memory_rss: Some(bytes),
        ..Usage::default()
    };
    Some(Reading {
        usage,
        processes: None,
    })
}

/// A backend whose readers count themselves in `open` as long as they exist and give readings by `read`, which gets the number of the
/// reading.
fn backend(
    open: &Arc<AtomicUsize>,
    read: impl Fn(u64) -> Option<Reading> + Clone + Send + Sync + 'static,
) -> MockContainerBackend {
    struct Open(Arc<AtomicUsize>);
    impl Drop for Open {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }
    let (mut mock, open) = (starts(), Arc::clone(open));
    mock.expect_usage_reader().returning(move |_| {
        open.fetch_add(1, Ordering::SeqCst);
        let (here, read) = (Open(Arc::clone(&open)), read.clone());
        let mut number = 0;
        let mut reader = MockUsageReader::new();
        reader.expect_read().returning(move |_| {
            let _here = &here;
            number += 1;
            read(number)
        });
        Box::new(reader)
    });
    mock
}

async fn stream(driver: &Driver, every: Duration) -> StatsStream {
    let request = proto::TaskStatsRequest {
        task_id: ID.to_owned(),
        collection_interval: Some(every.try_into().unwrap()),
    };
    let opened = driver.task_stats(Request::new(request)).await;
    opened.unwrap().into_inner()
}

async fn next(stats: &mut StatsStream) -> Option<proto::TaskStats> {
    let next = timeout(LIMIT, stats.next()).await.unwrap();
    next.map(|sample| sample.unwrap().stats.unwrap())
}

fn rss(sample: &proto::TaskStats) -> u64 {
    let usage = sample.agg_resource_usage.as_ref().unwrap();
    usage.memory.as_ref().unwrap().rss
}

/// Waits until this many readers are open.
async fn readers(open: &AtomicUsize, count: usize) {
    let closed = async {
        while open.load(Ordering::SeqCst) != count {
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, closed).await.unwrap();
}

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn they_start_immediately_and_end_with_the_task() {
    let open = Arc::default();
    let (driver, end) = running(backend(&open, memory)).await;
    let mut stats = stream(&driver, HOUR).await;
    let first = next(&mut stats).await.unwrap();
    assert!(first.timestamp.is_some() && first.agg_resource_usage.is_some());
    assert_eq!((first.id.as_str(), rss(&first)), (ID, 1));
    end.send_replace(Some(exit(0, 0)));
    assert_eq!(next(&mut stats).await, None);
    assert_eq!(next(&mut stats).await, None, "polled once more");
    drop(stats);
    readers(&open, 0).await;
}

#[tokio::test]
async fn they_are_repeated_at_the_interval() {
    let open = Arc::default();
    let (driver, _end) = running(backend(&open, memory)).await;
    let mut stats = stream(&driver, Duration::from_millis(1)).await;
    for number in 1..4 {
        assert_eq!(rss(&next(&mut stats).await.unwrap()), number);
    }
}

#[tokio::test]
async fn the_streams_of_a_task_share_its_files_and_the_last_one_closes_them() {
    let open = Arc::default();
    let (driver, _end) = running(backend(&open, memory)).await;
    let mut first = stream(&driver, HOUR).await;
    let mut second = stream(&driver, HOUR).await;
    let both = [next(&mut first).await, next(&mut second).await];
    let mut both = both.map(|sample| rss(&sample.unwrap()));
    both.sort_unstable();
    assert_eq!(both, [1, 2], "readings of one reader");
    assert_eq!(open.load(Ordering::SeqCst), 1);
    drop(first);
    // The thread handles this after the end of the first stream.
    let mut third = stream(&driver, HOUR).await;
    assert_eq!(rss(&next(&mut third).await.unwrap()), 3);
    drop((second, third));
    readers(&open, 0).await;
    let mut fourth = stream(&driver, HOUR).await;
    assert_eq!(rss(&next(&mut fourth).await.unwrap()), 1, "opened again");
}

#[tokio::test]
async fn a_group_that_has_vanished_ends_the_samples_but_not_the_stream() {
    let open = Arc::default();
    let gone = |number| (number < 2).then(|| memory(number)).flatten();
    let (driver, end) = running(backend(&open, gone)).await;
    let mut stats = stream(&driver, Duration::from_millis(1)).await;
    assert_eq!(rss(&next(&mut stats).await.unwrap()), 1);
    readers(&open, 0).await;
    let mut more = std::pin::pin!(stats.next());
    assert!(futures_util::poll!(more.as_mut()).is_pending());
    end.send_replace(Some(exit(0, 0)));
    assert!(timeout(LIMIT, more).await.unwrap().is_none());
}

#[tokio::test]
async fn after_a_panic_the_next_stream_has_a_thread_again() {
    static PANIC: std::sync::Once = std::sync::Once::new();
    let open = Arc::default();
    let once = |number| {
        let mut panic = false;
        PANIC.call_once(|| panic = true);
        assert!(!panic, "on purpose");
        memory(number)
    };
    let (driver, _end) = running(backend(&open, once)).await;
    let mut broken = stream(&driver, HOUR).await;
    assert_eq!(next(&mut broken).await, None);
    let mut stats = stream(&driver, HOUR).await;
    assert_eq!(rss(&next(&mut stats).await.unwrap()), 1);
}
